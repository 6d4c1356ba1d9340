"""Activations of experts that a kernel can compute by itself, and how to find out that a host's is one of them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger("densemixer")

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
GATES = ("concatenated", "interleaved")


@dataclasses.dataclass(frozen=True)
class Activation:
    """An expert's activation, written down: a(z), or a(gate)·(up + offset) for gated experts.

    Called with the up projection's result, [n, width], it returns the down projection's input, [n, ffn].

    Args:
        function: One of `FUNCTIONS`.
        gate: Where gate and up values lie, one of `GATES`: all gates first, or a gate before each up value. None for
            experts without gates.
        alpha: a(z) = z·σ(alpha·z), a SiLU with another slope. Other functions have none.
        limit: Gates are clamped to at most this, up values to its size, before all else.
        offset: Added to the up values.
    """

    function: str
    gate: str | None = None
    alpha: float = 1.0
    limit: float = float("inf")
    offset: float = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        if self.gate is None:
            return self._function(z)
        gate, up = z.chunk(2, -1) if self.gate == "concatenated" else (z[..., ::2], z[..., 1::2])
        return self._function(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + self.offset)

    def _function(self, z: Tensor) -> Tensor:
        return FUNCTIONS[self.function](z) if self.alpha == 1 else z * (z * self.alpha).sigmoid()


def recognise(
    activation: Callable[[Tensor], Tensor], gated: bool, alpha: float | None = None, limit: float | None = None
) -> Activation | None:
    """The `Activation` that computes what ``activation`` does, found by comparing their values; None if there is none.

    The values reach from -1000 to 1000, in all pairs of gate and up value, on the CPU.

    Args:
        activation: [n, width] → [n, ffn].
        gated: Whether width is 2·ffn.
        alpha: The slope that it may use.
        limit: The limit that it may use.
    """
    size = torch.tensor([0.1, 0.5, 1, 2, 4, 6, 8, 12, 50, 1000], device="cpu")
    values = torch.cat([-size.flip(0), size])
    pairs = torch.cartesian_prod(values, values).T.reshape(2, len(values), -1)
    inputs = torch.cat([*pairs], -1) if gated else pairs[0]
    try:
        expected = activation(inputs)
    except RuntimeError as error:  # it has parameters elsewhere, or computes on a GPU only
        logger.debug("DenseMixer knows no formula for an activation that doesn't run on the CPU: %s", error)
        return None
    for candidate in _candidates(gated, alpha, limit):
        found = candidate(inputs)
        if found.shape == expected.shape and torch.allclose(found, expected.to(found), rtol=1e-5, atol=1e-6):
            return candidate
    logger.debug("DenseMixer knows no formula for the activation %r; it computes expert by expert", activation)
    return None


def _candidates(gated: bool, alpha: float | None, limit: float | None) -> list[Activation]:
    if not gated:
        return [Activation(function) for function in FUNCTIONS]
    found = [Activation(function, gate) for gate, function in itertools.product(GATES, FUNCTIONS)]
    if limit is not None:
        found += [dataclasses.replace(candidate, limit=limit) for candidate in found]
        if alpha is not None:  # gpt-oss
            found += [Activation("silu", gate, alpha, limit, offset=1.0) for gate in GATES]
    return found
