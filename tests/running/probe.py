"""What a framework's own program did in its steps: losses, gradients against the oracle, and the routers' rows.

A framework's plugin makes one with its trainer. The report is JSON, in the file that PROBE names.
On several processes, each of which has the whole model, the truth is the mean of their gradients, and the first writes.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import oracle
import ranks
import setting
import torch
import torch.distributed as dist
import trainers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from densemixer_adapters.transformers import attached_layers


class Probe(trainers.Recorder):
    """Writes down the losses, the errors of the first step's gradients, and what became of the routers' rows."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.losses: list[float] = []
        self.routers = setting.FAMILY.blocks(trainer.model)
        self.start = [self.weight(block).detach().clone() for block in self.routers]
        self.seen: list[set[int]] = [set() for _ in self.routers]
        for block, seen in zip(self.routers, self.seen, strict=True):
            block.experts.register_forward_pre_hook(functools.partial(self.note, seen))

    @staticmethod
    def note(seen: set[int], experts: nn.Module, args: tuple[Any, ...]) -> None:
        seen.update(args[1].flatten().tolist())

    @staticmethod
    def weight(block: nn.Module) -> Tensor:
        """That is trained, if one is: PEFT keeps a copy of it beside the original."""
        return max(block.gate.parameters(), key=lambda parameter: parameter.requires_grad)

    def step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.own_step if self.losses else super().step  # the oracle goes along in the first
        loss = step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if state.global_step == 0:
            for truth in self.truth.values():
                truth.update({name: torch.stack(of_all(value)).mean(0) for name, value in truth.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        changes, never = [], 0
        for block, start, seen in zip(self.routers, self.start, self.seen, strict=True):
            everywhere = set().union(*of_all(seen))
            rows = [row for row in range(len(start)) if row not in everywhere]
            never += len(rows)
            changes.append((self.weight(block).detach() - start)[rows].norm(dim=-1))
        change = torch.cat(changes)
        errors = {name: setting.worst(worst_error, self.gradients, truth) for name, truth in self.truth.items()}
        report = {
            "ranks": len(of_all(None)),
            "apart": max((change - other).abs().max().item() for other in of_all(change)),
            "attached": len(attached_layers(self.trainer.model)),
            "losses": self.losses,
            "errors": errors,
            "never": never,
            "typical_change": change.median().item(),
            "largest_change": change.max().item(),
        }
        if not dist.is_initialized() or dist.get_rank() == 0:
            Path(os.environ["PROBE"]).write_text(json.dumps(report))


def of_all(value: Any) -> list[Any]:
    """What each process has."""
    return ranks.of_all_ranks(value) if dist.is_initialized() else [value]


def worst_error(value: Tensor, truth: Tensor) -> float:
    """LoRA's first factor has no gradient while the second one is zero."""
    return oracle.worst_error(value, truth) if truth.any() else value.abs().max().item()


class AtTheStart(TrainerCallback):
    """For programs whose trainer has no model yet when its callbacks are made."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Probe(self.trainer)
