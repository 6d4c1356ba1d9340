"""The routers' gradients of each batch, by each estimator. Nothing is trained, no parameter's ``grad`` is touched."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from densemixer_adapters.preflight.agreement import Gradients
from densemixer_adapters.preflight.batch import Batch
from densemixer_adapters.preflight.edge import Edge
from densemixer_adapters.preflight.watch import Watch
from densemixer_adapters.transformers import attach
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_core import DenseMixerConfig

Edges = list[Edge | None]
"""Of each layer; None if its router is frozen, or the layer wasn't called."""


@dataclasses.dataclass(frozen=True)
class Routers:
    """What of a model's routers is looked at.

    Attributes:
        parameters: Of each layer's router, those that train; of all if none does.
        frozen: Whether none does.
    """

    parameters: list[list[nn.Parameter]]
    frozen: bool

    @classmethod
    def of(cls, layers: Sequence[DenseMixerLayer]) -> Routers:
        """Of a model's layers.

        Raises:
            ValueError: None of their routers has a parameter that could train.
        """
        frozen = all(layer.router_is_frozen for layer in layers)
        found = [
            [p for p in layer.router.parameters() if p.is_floating_point() and (p.requires_grad or frozen)]
            for layer in layers
        ]
        if not any(found):
            raise ValueError("preflight: no router has a parameter of floating point, so none can train")
        return cls(found, frozen)

    @property
    def flat(self) -> list[nn.Parameter]:
        return [p for parameters in self.parameters for p in parameters]


@contextlib.contextmanager
def training_alone(model: nn.Module, routers: Routers) -> Iterator[None]:
    """Have nothing but the routers need a gradient, and all as it was afterwards: it saves most of the memory."""
    needed = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(p) for p in routers.flat}
    try:
        for p, _ in needed:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, before in needed:
            p.requires_grad_(before)


def conventional(
    model: nn.Module, batches: Sequence[Batch], routers: Routers, note: Callable[[Edges], None]
) -> Gradients:
    """The gradients of training without DenseMixer; of each batch, ``note`` is told of the edges of the selections."""

    def one(batch: Batch, layers: list[DenseMixerLayer]) -> list[Tensor]:
        watches = [Watch(layer) for layer in layers]
        loss = batch.loss(model)
        wanted = [tensor for watch in watches for tensor in watch.wanted]
        found = torch.autograd.grad(loss, [*routers.flat, *wanted], allow_unused=True)
        rest = iter(found[len(routers.flat) :])
        note([watch.edge(next(rest), next(rest), batch.mask) if watch.wanted else None for watch in watches])
        return _filled(routers, found)

    return _each(model, batches, routers, "centered", one)


def estimated(model: nn.Module, batches: Sequence[Batch], routers: Routers, estimator: str) -> Gradients:
    """The gradients of training with an estimator in all layers."""

    def one(batch: Batch, layers: list[DenseMixerLayer]) -> list[Tensor]:
        return _filled(routers, torch.autograd.grad(batch.loss(model), routers.flat, allow_unused=True))

    return _each(model, batches, routers, estimator, one)


def _each(
    model: nn.Module,
    batches: Sequence[Batch],
    routers: Routers,
    estimator: str,
    one: Callable[[Batch, list[DenseMixerLayer]], list[Tensor]],
) -> Gradients:
    """Of the mean loss of each batch, in float32 at least."""
    found = []
    with attach(model, DenseMixerConfig(estimator)) as handle, torch.enable_grad():
        handle.frozen_routers.fix = None  # the verdict speaks of them
        for batch in batches:
            flat = iter([gradient / batch.predicted for gradient in one(batch, handle.layers)])
            found.append([[next(flat) for _ in parameters] for parameters in routers.parameters])
    return found


def _filled(routers: Routers, found: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the routers' parameters, in float32 at least; zero where the loss doesn't depend on one."""
    return [
        (torch.zeros_like(p) if gradient is None else gradient).to(torch.promote_types(p.dtype, torch.float32))
        for p, gradient in zip(routers.flat, found[: len(routers.flat)], strict=True)
    ]
