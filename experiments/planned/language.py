"""The task of E1 and E2: the next token of text of another kind. The metric is the loss in nats per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from batches import Batch
from planned.sizes import Planned
from torch import Tensor

HELD_OUT_ROWS = 32


class Language:
    """Windows of a text, in the order that a seed gives; a `post_training.tasks.Task`.

    A run with more steps begins with the windows of one with fewer.

    Args:
        ids: The token ids of each split, [tokens].
    """

    def __init__(self, ids: Mapping[str, Tensor], size: Planned, steps: int, seed: int) -> None:
        self.steps = steps
        self._train = ids["train"]
        generator = torch.Generator().manual_seed(seed)
        last = len(self._train) - size.window
        self._begins = [torch.randint(last, (size.rows, 1), generator=generator) for _ in range(steps)]
        self._places = torch.arange(size.window)
        self._held_out = {
            split: ids[split][torch.linspace(0, len(ids[split]) - size.window, rows).long()[:, None] + self._places]
            for split, rows in (("validation", size.validation), ("test", size.test))
        }
        probe = self._held_out["validation"][:HELD_OUT_ROWS]
        self.probe = Batch(probe, torch.ones_like(probe), probe)

    def batch(self, step: int) -> dict[str, Tensor]:
        ids = self._train[self._begins[step] + self._places]
        return {"input_ids": ids, "labels": ids}

    def loss(self, model: Any, step: int) -> Tensor:
        loss: Tensor = model(**self.batch(step), use_cache=False).loss
        return loss

    @torch.no_grad()
    def evaluate(self, model: Any, split: str) -> float:
        parts = self._held_out[split].split(HELD_OUT_ROWS)
        losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in parts]
        return float(sum(losses)) / len(self._held_out[split])
