"""Updates of routers that rounding has swallowed whole.

A weight in bfloat16 has 8 bits: an update below 1/512 of it is rounded away, in each step anew, and lost. So a small
learning rate can train nothing at all where the optimizer steps such weights themselves. Where it steps float32 copies
of them (mixed precision by autocast or FSDP, DeepSpeed's bf16 and fp16), small updates add up there, and none is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from densemixer_adapters.metrics.gradients import Measured, sum_over_ranks
from densemixer_adapters.metrics.names import LOST


class HasRouter(Protocol):
    """A layer, or what stands for it."""

    @property
    def router(self) -> nn.Module:
        """The module whose parameters are looked at."""


class LostUpdates:
    """Compares the routers' trained parameters before and after an optimizer step, each rank those that it holds.

    ``updates_lost`` is, of the elements with a gradient other than zero, the share that the step left as they were, bit
    for bit.

    Args:
        layers: The layers whose routers to compare.
    """

    def __init__(self, layers: Sequence[HasRouter]) -> None:
        self.layers = layers
        self._before: list[list[tuple[nn.Parameter, Tensor, Tensor]]] | None = None
        self._counts: list[list[float]] = []

    def before_step(self, optimizer: Any) -> None:
        """Keep the parameters that are about to be stepped at a learning rate other than zero, or one of their own."""
        stepped = {id(p) for group in _groups(optimizer) if group.get("lr") != 0 for p in group["params"]}
        self._before = [
            [
                (p, _mine(p).clone(), _mine(p.grad) != 0)
                for p in layer.router.parameters()
                if p.grad is not None and id(p) in stepped
            ]
            for layer in self.layers
        ]

    def after_step(self, skipped: bool = False) -> None:
        """Compare; does nothing if `before_step` wasn't called.

        Args:
            skipped: Whether a gradient scaler has left the step out.
        """
        before, self._before = self._before, None
        if before is None:
            return
        self._counts = [[0.0, 0.0] for _ in self.layers]
        if skipped:
            return
        for position, parameters in enumerate(before):
            for parameter, old, wanted in parameters:
                lost, whole = (wanted & (_mine(parameter) == old)).sum(), wanted.sum()
                self._counts[position][0] += lost.item()
                self._counts[position][1] += whole.item()

    def measure(self) -> dict[str, Measured]:
        """Of the last step, by layer and over all of them. Collective: all ranks call it."""
        if not self._counts:
            return {}
        rows = sum_over_ranks(self._counts)
        layers = [lost / whole if whole else math.nan for lost, whole in rows]
        lost, whole = (sum(column) for column in zip(*rows, strict=True))
        return {LOST: Measured(layers, lost / whole if whole else math.nan)}


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """VeOmni puts several optimizers into one, those of the experts apart, that has no groups of its own."""
    parts = getattr(optimizer, "optimizers_dict", None)
    return [group for part in (parts.values() if parts else [optimizer]) for group in part.param_groups]


def _mine(tensor: Tensor) -> Tensor:
    """What this rank holds of it, dense."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach() if local.layout is torch.strided else local.detach().to_dense()
