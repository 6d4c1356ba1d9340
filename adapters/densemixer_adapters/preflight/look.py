"""`preflight`: a look at a model and its data before it is trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from densemixer_adapters.metrics.drift import Routing, evaluating
from densemixer_adapters.metrics.gradients import Measured
from densemixer_adapters.preflight.agreement import Gradients, cosine_of_halves, noise_tokens, products
from densemixer_adapters.preflight.batch import Batch
from densemixer_adapters.preflight.edge import PERCENTILES, Edge, Moves, joined, moves
from densemixer_adapters.preflight.passes import Edges, Routers, conventional, estimated, training_alone
from densemixer_adapters.preflight.result import Estimated, Preflight
from densemixer_adapters.preflight.steps import routing, share_changed, shares, take
from densemixer_adapters.preflight.verdict import judge
from densemixer_adapters.transformers import attach


def preflight(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, steps: int = 1000, learning_rate: float = 1e-5
) -> Preflight:
    """Look, from a few batches, whether training would move the routing of a model, and by a signal or by noise.

    Nothing is trained: weights, their ``grad``, which of them need one, modes and hooks are afterwards what they were.
    For each batch the model runs forward and backward once an estimator, and forward once more, in evaluation mode.

    Args:
        model: A model of transformers with Mixture-of-Experts layers, in this process alone; with adapters of PEFT too.
        batches: An even number of them, each what a training loop calls the model with: ``input_ids``, [sequences,
            tokens], on the model's device, and ``attention_mask`` and ``labels`` if it has them. A batch stands for a
            step.
        steps: The number of steps that the training is to have.
        learning_rate: Of each step, for the routers; where it falls, the mean.

    Raises:
        UnsupportedModelError: DenseMixer can't train this model. The message names the layer, the reason and the fix.
        ValueError: The batches or numbers aren't as above, or no router has anything that could train.
        RuntimeError: DenseMixer is attached already.
    """
    if len(batches) < 2 or len(batches) % 2:
        raise ValueError(
            f"preflight: compares halves of the batches, so give an even number of them, not {len(batches)}"
        )
    if steps < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(f"preflight: needs a step and a learning rate above 0, got {steps} and {learning_rate}")
    return _Look(model, [Batch.of(model, batch) for batch in batches], steps, learning_rate).result()


class _Look:
    """See `preflight`."""

    def __init__(self, model: nn.Module, batches: list[Batch], steps: int, learning_rate: float) -> None:
        self.model, self.batches, self.steps, self.learning_rate = model, batches, steps, learning_rate
        self.predicted = sum(batch.predicted for batch in batches)
        with attach(model) as handle:
            self.routers = Routers.of(handle.layers)
            self.names = [layer.name for layer in handle.layers]
            self.renormalised = any(layer.renormalised for layer in handle.layers)

    def result(self) -> Preflight:
        seen: list[Edges] = []
        with evaluating(self.model), training_alone(self.model, self.routers):
            found = {"conventional": self.estimate(conventional(self.model, self.batches, self.routers, seen.append))}
            for name in ("densemixer", "centered")[: 1 + self.renormalised]:
                found[name] = self.estimate(estimated(self.model, self.batches, self.routers, name))
        edges = [_of_layer(layer) for layer in zip(*seen, strict=True)]
        moved = [None if edge is None else moves(edge, self.steps, self.learning_rate) for edge in edges]
        at_most = _of_selections(moved, "at_most")
        best_swap = self.gain([None if edge is None else float(edge.best.sum()) for edge in edges])
        tokens = self.predicted / len(self.batches)
        return Preflight(
            layers=self.names,
            frozen=self.routers.frozen,
            trained=[bool(parameters) for parameters in self.routers.parameters],
            steps=self.steps,
            learning_rate=self.learning_rate,
            batches=len(self.batches),
            tokens=tokens,
            dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.routers.flat})),
            margins=[[math.nan] * len(PERCENTILES) if one is None else one.margins for one in moved],
            reach=[(math.nan, math.nan) if one is None else one.reach for one in moved],
            at_most=at_most,
            by_noise=_of_selections(moved, "by_noise"),
            best_swap=best_swap,
            next_swap=self.gain([None if edge is None else float(edge.following.sum()) for edge in edges]),
            estimators=found,
            verdict=judge(self.routers.frozen, self.steps, self.learning_rate, tokens, at_most, best_swap, found),
        )

    def estimate(self, gradients: Gradients) -> Estimated:
        """What an estimator's gradients of each batch would do."""
        weights, lost = take(self.routers.parameters, gradients, self.learning_rate, self.steps)
        now = self.route(weights)
        by_layer = products(gradients)
        whole = sum(by_layer[1:], by_layer[0])
        return Estimated(
            Measured([cosine_of_halves(one) for one in by_layer], cosine_of_halves(whole)),
            noise_tokens(whole, self.predicted / len(self.batches)),
            share_changed(self.start, now),
            lost,
        )

    @functools.cached_property
    def start(self) -> list[list[Routing | None]]:
        """The routing as it is."""
        return self.route([[p.detach() for p in parameters] for parameters in self.routers.parameters])

    def route(self, weights: list[list[Tensor]]) -> list[list[Routing | None]]:
        """The routing with these weights of the routers."""
        with attach(self.model) as handle:  # its layers report it
            return routing(self.model, handle.layers, self.batches, self.routers.parameters, weights)

    def gain(self, sums: Sequence[float | None]) -> Measured:
        """In nats for each token that is predicted, from the sums over tokens."""
        layers = [math.nan if value is None else value / self.predicted for value in sums]
        return Measured(layers, sum(value for value in layers if not math.isnan(value)))


def _of_layer(edges: Sequence[Edge | None]) -> Edge | None:
    known = [edge for edge in edges if edge is not None]
    return joined(known) if known else None


def _of_selections(moved: Sequence[Moves | None], what: str) -> Measured:
    """The share of the selections; a layer whose router is frozen has none."""
    return shares([(0.0, 0.0) if one is None else (getattr(one, what), one.selections) for one in moved])
