"""The five ways of training the routers that are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from densemixer_adapters.metrics.gradients import RouterMeter
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

BASELINE = "conventional"
CONVENTIONAL = DenseMixerConfig("conventional")

ARMS: dict[str, DenseMixerConfig | None] = {
    "frozen router": None,
    BASELINE: CONVENTIONAL,
    "densemixer": DenseMixerConfig("densemixer"),
    "centered": DenseMixerConfig("centered"),
    "densemixer, budget 1/8": DenseMixerConfig("densemixer", budget=1 / 8),
}


@contextlib.contextmanager
def attached(model: Any, arm: str) -> Iterator[RouterMeter | None]:
    """Train the model by an arm. Yields what measures the gradient of the routers, None if they are frozen."""
    config = ARMS[arm]
    with apply_densemixer(model, config or CONVENTIONAL) as handle:
        routers = [layer.router for layer in handle.layers]
        for router in routers:
            router.requires_grad_(config is not None)
        yield None if config is None else RouterMeter(handle.layers)
    for router in routers:
        router.requires_grad_(True)
