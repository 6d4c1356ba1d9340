"""Supervised fine-tuning: from a function's source to its docstring.

The metric is the negative log-likelihood of held-out docstrings, in nats per token; lower is better.
"""

from __future__ import annotations

from typing import Any

import torch
from batches import Batch, collate, schedule
from common.sizes import Size
from start.corpus import Corpus
from torch import Tensor

HELD_OUT_ROWS = 32


class Docstrings:
    """The task with the order of the examples that a seed gives; a `tasks.Task`."""

    def __init__(self, corpus: Corpus, size: Size, seed: int, device: str) -> None:
        pad = corpus.tokenizer.pad_token_id
        self.steps = size.sft_steps
        self._batches = schedule(corpus.docstrings["train"], size.sft_steps, size.sft_rows, pad, seed)
        self._held_out = {
            split: [
                collate(examples[first : first + HELD_OUT_ROWS], pad).to(device)
                for first in range(0, len(examples), HELD_OUT_ROWS)
            ]
            for split, examples in corpus.docstrings.items()
            if split != "train"
        }
        self._device = device
        self.probe: Batch = self._held_out["validation"][0]

    def batch(self, step: int) -> dict[str, Tensor]:
        return self._batches[step].to(self._device)._asdict()

    def loss(self, model: Any, step: int) -> Tensor:
        loss: Tensor = model(**self.batch(step), use_cache=False).loss
        return loss

    @torch.no_grad()
    def evaluate(self, model: Any, split: str) -> float:
        total, tokens = 0.0, 0
        for batch in self._held_out[split]:
            total += model(**batch._asdict(), use_cache=False).loss.item() * batch.answers
            tokens += batch.answers
        return total / tokens
