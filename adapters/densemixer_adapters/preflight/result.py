"""What a preflight has found."""

from __future__ import annotations

import dataclasses

from densemixer_adapters.metrics.gradients import Measured
from densemixer_adapters.metrics.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class Estimated:
    """What the gradient of one estimator would do. NaN where there is none, as for a layer whose router is frozen.

    Attributes:
        agreement: The cosine between the routers' gradients of two halves of the batches, mean over all ways to halve.
        noise_tokens: With how many tokens a step the noise in the gradient is as large as the signal; infinite if the
            batches show no signal.
        change: The share of the selections that the steps would change, to first order: see `steps`.
        lost: The share of Adam's updates that the dtype of the weights would round away.
    """

    agreement: Measured
    noise_tokens: float
    change: Measured
    lost: Measured


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What `preflight` has found, without training. NaN is what isn't known.

    Attributes:
        layers: The names of the Mixture-of-Experts layers.
        frozen: Whether all of their routers are. Then the rest is what would be if they were trained.
        trained: Of each layer, whether its router is among those that are looked at.
        steps, learning_rate: As given.
        batches: How many.
        tokens: To be predicted in a batch, mean.
        dtype: Of the routers' weights.
        margins: Of each layer, percentiles (see `edge.PERCENTILES`) of how far the weakest selected expert is above the
            strongest unselected one, in logits.
        reach: How far the steps can move two logits against each other at most, median over tokens, and by noise alone
            (a standard deviation), by layer.
        at_most: The share of the selections that the steps can change at most.
        by_noise: The share that they would change if no two steps agreed.
        best_swap: What it would lower the loss by, to first order, if each token swapped its weakest selected expert
            for the best of all others: nats a token, by layer, and their sum.
        next_swap: The same for the strongest unselected one, where that lowers the loss.
        estimators: By name.
        verdict: What that says.
    """

    layers: list[str]
    frozen: bool
    trained: list[bool]
    steps: int
    learning_rate: float
    batches: int
    tokens: float
    dtype: str
    margins: list[list[float]]
    reach: list[tuple[float, float]]
    at_most: Measured
    by_noise: Measured
    best_swap: Measured
    next_swap: Measured
    estimators: dict[str, Estimated]
    verdict: Verdict
