"""What is compared in each part of the experiment, and which weights each arm trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from post_training.arms import BASELINE, CONVENTIONAL

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

DENSEMIXER = DenseMixerConfig("densemixer")
CENTERED = DenseMixerConfig("centered")

FROZEN_START = "frozen start"
FROZEN_ROUTER = "frozen router"
EQUAL_TIME = "conventional, equal time"


class Arm(NamedTuple):
    """A way of training.

    Attributes:
        config: How routers get their gradient.
        routers: Whether routers are trained.
        others: Whether all other weights are.
        factor: The learning rate of routers over that of the others.
    """

    config: DenseMixerConfig = CONVENTIONAL
    routers: bool = True
    others: bool = True
    factor: float = 1.0


def _alone(config: DenseMixerConfig) -> Arm:
    return Arm(config, others=False)


ROUTER_ONLY = {
    FROZEN_START: Arm(routers=False, others=False),
    BASELINE: _alone(CONVENTIONAL),
    EQUAL_TIME: _alone(CONVENTIONAL),
    "densemixer": _alone(DENSEMIXER),
    "centered": _alone(CENTERED),
    "centered, budget 1/32": _alone(DenseMixerConfig("centered", budget=1 / 32)),
}

ROUTER_RATE = {
    FROZEN_ROUTER: Arm(routers=False),
    BASELINE: Arm(),
    "conventional, x10": Arm(factor=10),
    "densemixer": Arm(DENSEMIXER),
    "densemixer, x10": Arm(DENSEMIXER, factor=10),
    "centered": Arm(CENTERED),
    "centered, x10": Arm(CENTERED, factor=10),
}

UP_CYCLED = {
    FROZEN_ROUTER: Arm(routers=False),
    BASELINE: Arm(),
    "densemixer": Arm(DENSEMIXER),
    "centered": Arm(CENTERED),
}


@contextlib.contextmanager
def training(model: Any, arm: Arm, rate: float) -> Iterator[list[dict[str, Any]]]:
    """Attach the arm to the model, and freeze what it doesn't train. Yields what the optimizer is to have.

    Args:
        rate: The learning rate of all weights but routers, or of these where they are alone.
    """
    with apply_densemixer(model, arm.config) as handle:
        routers = [weight for layer in handle.layers for weight in layer.router.parameters()]
        known = {id(weight) for weight in routers}
        others = [weight for weight in model.parameters() if id(weight) not in known]
        for weights, trained in ((routers, arm.routers), (others, arm.others)):
            for weight in weights:
                weight.requires_grad_(trained)
        yield [{"params": others, "lr": rate}, {"params": routers, "lr": rate * arm.factor}]
