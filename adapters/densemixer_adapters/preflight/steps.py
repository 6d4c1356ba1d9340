"""How N steps of Adam would move the routers, to first order, and how the model would route then.

The steps are Adam's own, on copies of the routers' weights in their dtype, with the gradients of the batches in turn,
which stay what they are at the start: that is the first order. So each element moves by about N·η·ḡ/√(mean of g²), with
the mean ḡ over batches, as far as the dtype doesn't round its updates away. Once it has gone on for `TAKEN` steps, the
rest is taken to go on in the same way.

Then the model runs with these weights in the place of its own, and routes as it does: with the biases, groups and
further experts that its routers have, and each layer on what the layers below it make now.

What it assumes, besides: that the batches come again and again. In a run that never sees a batch twice, what they don't
have in common cancels out, and the routers move less along it: see `agreement`. The learning rate is that of each step,
and there is neither weight decay nor clipping, which hardly changes what Adam does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from densemixer_adapters.metrics.drift import Routing, routing_of
from densemixer_adapters.metrics.gradients import Measured, mean
from densemixer_adapters.metrics.lost_updates import LostUpdates
from densemixer_adapters.metrics.names import LOST
from densemixer_adapters.preflight.agreement import Gradients
from densemixer_adapters.preflight.batch import Batch
from densemixer_adapters.transformers.layer import DenseMixerLayer

TAKEN = 64
"""Of more steps, so many are taken one by one. By then Adam's means are made."""


class _Copy:
    """Of a layer's router: what the optimizer steps in its place. In float16 no framework steps weights."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.router = nn.ParameterList(
            p.detach().to(torch.float32 if p.dtype == torch.float16 else p.dtype, copy=True) for p in parameters
        )


def take(
    routers: Sequence[Sequence[nn.Parameter]], gradients: Gradients, learning_rate: float, steps: int
) -> tuple[list[list[Tensor]], Measured]:
    """Where the routers' weights are after so many steps, and the share of updates that rounding swallows, a step.

    Args:
        routers: The parameters of each layer's router. They stay as they are.
        gradients: Of each batch.
        learning_rate: Of each step.
        steps: How many.
    """
    copies = [_Copy(parameters) for parameters in routers]
    optimizer = torch.optim.AdamW(
        [p for copy in copies for p in copy.router.parameters()], lr=learning_rate, weight_decay=0.0
    )
    lost, shares = LostUpdates(copies), []
    taken = min(steps, TAKEN)
    for step in range(taken):
        for copy, layer in zip(copies, gradients[step % len(gradients)], strict=True):
            for p, gradient in zip(copy.router.parameters(), layer, strict=True):
                p.grad = gradient.to(p.dtype)
        lost.before_step(optimizer)
        optimizer.step()
        lost.after_step()
        shares.append(lost.measure()[LOST])
    moved = [
        [_further(p, now, steps / taken) for p, now in zip(parameters, copy.router.parameters(), strict=True)]
        for parameters, copy in zip(routers, copies, strict=True)
    ]
    layers = [mean(share.layers[position] for share in shares) for position in range(len(routers))]
    return moved, Measured(layers, mean(share.whole for share in shares))


@torch.no_grad()
def _further(start: Tensor, now: Tensor, times: float) -> Tensor:
    wide = torch.promote_types(start.dtype, torch.float32)
    first = start.detach().to(wide)
    return (first + times * (now.to(wide) - first)).to(start.dtype)


def routing(
    model: nn.Module,
    layers: Sequence[DenseMixerLayer],
    batches: Sequence[Batch],
    routers: Sequence[Sequence[nn.Parameter]],
    weights: Sequence[Sequence[Tensor]],
) -> list[list[Routing | None]]:
    """How the model routes each batch with other weights of its routers, by layer.

    Args:
        model: The model, in evaluation mode. Its parameters stay as they are.
        layers: Its layers that DenseMixer is attached to.
        batches: What it is called with.
        routers: The parameters of each layer's router.
        weights: What takes their places.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [pair for both in zip(routers, weights, strict=True) for pair in zip(*both, strict=True)]
    changed = {names[id(p)]: weight for p, weight in pairs}

    def routing_of_one(batch: Batch) -> list[Routing | None]:
        return routing_of(layers, lambda: functional_call(model, changed, (), batch.arguments), batch.mask)

    return [routing_of_one(batch) for batch in batches]


def share_changed(start: list[list[Routing | None]], now: list[list[Routing | None]]) -> Measured:
    """The share of the selected experts that are selected no longer, by layer and over all of them."""
    rows = []
    for befores, afters in zip(zip(*start, strict=True), zip(*now, strict=True), strict=True):
        pairs = [(a, b) for a, b in zip(befores, afters, strict=True) if a is not None and b is not None]
        found = [a.compare(b)[:2] for a, b in pairs]
        rows.append([sum(column) for column in zip(*found, strict=True)] or [0.0, 0.0])
    return shares(rows)


def shares(rows: Sequence[Sequence[float]]) -> Measured:
    """Of rows with a part and the whole, one a layer."""
    part, whole = (sum(column) for column in zip(*rows, strict=True))
    return Measured([_share(*row) for row in rows], _share(part, whole))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
