"""What a framework's own program did in its training steps: the loss, all gradients against the oracle, the routers' rows.

A framework's plugin calls `watch` with its trainer; the report is JSON, in the file that PROBE names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import oracle
import setting
import torch
import trainers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from densemixer_adapters.transformers import attached_layers


class Probe(trainers.Recorder):
    """Writes down the losses of all steps, the errors of the first step's gradients, and what became of routers' rows."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.losses: list[float] = []
        self.routers = setting.FAMILY.blocks(trainer.model)
        self.start = [self.weight(block).detach().clone() for block in self.routers]
        self.seen: list[set[int]] = [set() for _ in self.routers]
        for block, seen in zip(self.routers, self.seen, strict=True):
            block.experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(args[1].flatten().tolist()))

    @staticmethod
    def weight(block: nn.Module) -> Tensor:
        return next(p for p in block.gate.parameters() if p.requires_grad)

    def step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        changes, never = [], 0
        for block, start, seen in zip(self.routers, self.start, self.seen, strict=True):
            rows = [row for row in range(len(start)) if row not in seen]
            never += len(rows)
            changes.append((self.weight(block).detach() - start)[rows].norm(dim=-1))
        change = torch.cat(changes)
        report = {
            "attached": len(attached_layers(self.trainer.model)),
            "losses": self.losses,
            "errors": {name: setting.worst(oracle.worst_error, self.gradients, self.truth[name]) for name in self.truth},
            "never": never,
            "least_change": change.min().item(),
            "largest_change": change.max().item(),
        }
        Path(os.environ["PROBE"]).write_text(json.dumps(report))


class AtTheStart(TrainerCallback):
    """For programs whose trainer has no model yet when its callbacks are made."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Probe(self.trainer)
