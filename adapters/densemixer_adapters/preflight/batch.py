"""The data that a preflight looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from densemixer_adapters.metrics.drift import without_loss

IGNORED = -100
"""The label of a token that isn't to be predicted, as everywhere."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step would train on.

    Attributes:
        arguments: What the model is called with.
        labels: [sequences, tokens].
        mask: Which tokens are no padding, [sequences · tokens], on the CPU, for layers on any device; None for all.
        predicted: The number of tokens that are to be predicted.
    """

    arguments: dict[str, Any]
    labels: Tensor
    mask: Tensor | None
    predicted: int

    @classmethod
    def of(cls, model: nn.Module, given: Mapping[str, Any]) -> Batch:
        """From what a training loop calls a language model with.

        Raises:
            ValueError: It has no ``input_ids``, or nothing to predict.
        """
        ids, given_mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError("preflight: a batch is a mapping with `input_ids` of [sequences, tokens]")
        mask = given_mask.bool() if isinstance(given_mask, Tensor) and given_mask.dim() == 2 else None
        labels = given.get("labels")
        if labels is None:
            labels = ids if mask is None else ids.masked_fill(~mask, IGNORED)
        predicted = int((labels[:, 1:] != IGNORED).sum())
        if not predicted:
            raise ValueError("preflight: a batch has no token to predict: its labels are all -100")
        return cls(without_loss(model, given), labels, None if mask is None else mask.flatten().cpu(), predicted)

    def loss(self, model: nn.Module) -> Tensor:
        """The sum over the tokens that are to be predicted, in nats; no balancing loss.

        A sum, since the gradients of a mean over thousands of tokens would be below what float16 can tell from zero.

        Raises:
            ValueError: The model is no causal language model.
        """
        logits = getattr(model(**self.arguments), "logits", None)
        if logits is None or logits.shape[:2] != self.labels.shape:
            raise ValueError(
                f"preflight: {type(model).__name__} returns no logits of the next token for each of a batch, as a "
                "causal language model does"
            )
        wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        labels = self.labels[:, 1:].flatten().to(logits.device)
        return cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")
