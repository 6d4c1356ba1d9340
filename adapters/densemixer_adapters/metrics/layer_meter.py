"""What reaches one layer's router in the backward, and the load of its experts, on this rank.

Measured on the way, from the gradient of the router's logits: two small matrix products a layer in the backward,
nothing in the forward, no second pass. No parameter's ``grad`` is read, so it doesn't matter who shards, reduces or
frees it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from densemixer_adapters.observer import Forward, Observer
from densemixer_core.routing import score_gradient_to_logits


class Watched(Protocol):
    """A layer that can be watched, of whatever framework."""

    observer: Observer | None

    @property
    def name(self) -> str:
        """With its number in the model."""

    @property
    def router_is_linear(self) -> bool:
        """Whether the router's logits are its weight times its input, plus a bias at most."""

    @property
    def score(self) -> str:
        """The function that makes scores of the router's logits, see `densemixer_core.routing`."""

    def take_pairs_left_out(self) -> Tensor | None:
        """How many pairs overflowed in float16 since this was last called, a scalar; None if nothing was counted."""


class LayerMeter:
    """Of one layer, on this rank. Its `observe` is the layer's observer.

    Args:
        layer: The layer. It is watched from now on.
        load: Whether to count the experts' load too.

    Attributes:
        shape: [experts, hidden] of the router's weight, once it is known.
        experts: The number of experts, likewise.
        total: The sum of the weight's gradients.
        added: Of what DenseMixer adds to them.
    """

    def __init__(self, layer: Watched, load: bool) -> None:
        self.linear, self.score, self.count = layer.router_is_linear, layer.score, load
        self.shape: tuple[int, int] | None = None
        self.experts: int | None = None
        self.device: torch.device | None = None
        self.total: Tensor | None = None
        self.added: Tensor | None = None
        self.loads: Tensor | None = None
        self._lock = threading.Lock()  # backwards may run in several threads
        layer.observer = self.observe

    def discard_gradients(self) -> None:
        self.total = self.added = None

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply what has been summed up by it."""
        for gradient in (self.total, self.added):
            if gradient is not None:
                gradient.mul_(factor)

    def read(self) -> Tensor:
        """Total and added gradient, [2, experts, hidden]."""
        assert self.shape is not None
        zero = torch.zeros(self.shape, device=self.device)
        both = torch.stack([zero if self.total is None else self.total, zero if self.added is None else self.added])
        self.total = self.added = None
        return both

    def read_load(self) -> Tensor:
        """The number of tokens of each expert, [experts]."""
        assert self.experts is not None
        loads = self.loads
        self.loads = None
        return torch.zeros(self.experts, device=self.device, dtype=torch.float64) if loads is None else loads[:-1]

    def observe(self, forward: Forward, output: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `densemixer_adapters.observer.Observer`."""
        x, router_output = forward.router_input, forward.router_output
        if x is None:
            return output, scores
        self.experts, self.device = router_output.shape[-1], x.device
        call = _Call()

        def carried(x: Tensor, index: Tensor, probabilities: Tensor | None) -> None:
            call.x, call.probabilities = x, probabilities
            if self.count:
                self._add_load(index)

        def added(gradient: Tensor) -> None:
            call.added = gradient

        if self.linear:
            self.shape = self.experts, x.shape[-1]
            # The gradient of the output's own tensor, whoever uses it. It keeps nothing alive: see `_Carry`.
            router_output.register_hook(lambda gradient: self._add_gradients(call, gradient))  # type: ignore[no-untyped-call]
            if scores is not None:
                scores = _Added.apply(scores, self.score, added)  # type: ignore[no-untyped-call]
        probabilities = router_output.detach() if forward.probabilities else None
        return _Carry.apply(output, x.detach(), forward.index, probabilities, carried), scores  # type: ignore[no-untyped-call]

    def _add_load(self, index: Tensor) -> None:
        assert self.experts is not None
        with self._lock:
            if self.loads is None:
                # The last one is for what is no expert of this process.
                self.loads = torch.zeros(self.experts + 1, device=index.device, dtype=torch.float64)
            index = index.flatten().clamp(max=self.experts)
            self.loads.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))

    def _add_gradients(self, call: _Call, gradient: Tensor) -> None:
        """Called with the gradient of the router's output, when the layer's part in the backward is over."""
        x, added, probabilities = call.x, call.added, call.probabilities
        call.x = call.added = call.probabilities = None
        if x is None:  # the loss depends on the router alone, as an auxiliary loss can
            return
        x = x.reshape(-1, x.shape[-1])
        total = gradient.reshape(-1, gradient.shape[-1])
        if probabilities is not None:
            total = score_gradient_to_logits(total, probabilities.reshape(total.shape), "softmax")
        with self._lock:
            self.total = _add(self.total, total, x)
            if added is not None:
                self.added = _add(self.added, added, x)


class _Call:
    """What the backward of one forward of a layer has found so far."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.probabilities: Tensor | None = None
        self.added: Tensor | None = None


def _add(sum: Tensor | None, logits: Tensor, x: Tensor) -> Tensor:
    """``sum`` and the gradient of a linear router's weight, from that of its logits and its input."""
    gradient = (logits.t().to(x.dtype) @ x).to(torch.promote_types(x.dtype, torch.float32))
    return gradient if sum is None else sum.add_(gradient)


class _Carry(torch.autograd.Function):
    """The identity on the experts' output. Its backward, the first of the layer, hands on what the others need.

    Saved, not closed over: activation checkpointing frees what is saved until the backward needs it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        index: Tensor,
        probabilities: Tensor | None,
        carried: Callable[[Tensor, Tensor, Tensor | None], None],
    ) -> Tensor:
        ctx.save_for_backward(x, index, probabilities)
        ctx.carried = carried
        return output.detach()  # no view, see `densemixer_core.straight_through`

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ctx.carried(*ctx.saved_tensors)
        return g, None, None, None, None


class _Added(torch.autograd.Function):
    """The identity on the scores. Its backward turns what DenseMixer adds to them into a gradient of the logits."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, score: str, added: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.score, ctx.added = score, added
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (p,) = ctx.saved_tensors
        ctx.added(score_gradient_to_logits(g, p, ctx.score))
        return g, None, None
