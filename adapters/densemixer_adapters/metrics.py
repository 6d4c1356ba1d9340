"""What reaches the routers in the backward: their gradient, the part that DenseMixer adds, and the experts' load.

Measured on the way, from the gradient of each router's logits: two small matrix products a layer in the backward,
nothing in the forward, no second pass. No parameter's ``grad`` is read, so it doesn't matter who shards, reduces or
frees it.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from densemixer_adapters.layer import DenseMixerLayer, Forward
from densemixer_adapters.metric_names import COSINE, ENTROPY, LEFT_OUT, MAXIMUM, NORM, PREFIX, SHARE
from densemixer_core.routing import score_gradient_to_logits


class RouterMeter:
    """Measures between two optimizer steps. Reductions take all ranks alike, as DDP, FSDP and ZeRO reduce gradients.

    The gradient is that of the router's weight; of the product with its adapter included, where LoRA trains it. Routers
    that don't multiply their input by one weight have none here, and neither have frozen ones.

    Args:
        layers: The layers to watch. They must not be watched already.
        load: Whether to count the experts' load too.
    """

    def __init__(self, layers: Sequence[DenseMixerLayer], load: bool = False) -> None:
        self.layers = layers
        self._records = {layer: _Record(layer.router_is_linear, load) for layer in layers}
        for layer, record in self._records.items():
            layer.observer = functools.partial(_observe, layer, record)

    def remove(self) -> None:
        """Watch no longer."""
        for layer in self.layers:
            layer.observer = None

    def discard_gradients(self) -> None:
        """Forget the gradients since the last step; the load goes on being counted."""
        for record in self._records.values():
            record.total = record.added = None

    def gradients(self, scale: float = 1.0) -> dict[str, list[float]]:
        """The gradients since they were last discarded or read, as sums over micro-batches and means over ranks.

        Collective: all ranks call it.

        Args:
            scale: What the loss was multiplied by, for a gradient scaler.

        Returns:
            For each metric the values of all layers, NaN where there is none, and the one over all layers at the end;
            nothing if no router had a gradient. ``router_grad_norm`` is the norm of the gradient G,
            ``router_grad_share_unselected`` is ‖A‖ / (‖A‖ + ‖G − A‖) for the part A that DenseMixer adds, and
            ``router_grad_cosine_conventional`` is the cosine of G and G − A.
        """
        known = {layer: record for layer, record in self._records.items() if record.shape is not None}
        if not known:
            return {}
        rows = []
        for record in known.values():
            sums = record.read()
            _sum_over_ranks(sums)
            total, added = sums.double().flatten(1) / _ranks()
            rest = total - added
            rows.append(torch.stack([total.dot(total), added.dot(added), rest.dot(rest), total.dot(rest)]))
        squares = dict(zip(known, torch.stack(rows).tolist(), strict=True))
        rows_of_layers = [squares.get(layer, [math.nan] * 4) for layer in self.layers]
        whole = [sum(column) for column in zip(*squares.values(), strict=True)]
        found: dict[str, list[float]] = {NORM: [], SHARE: [], COSINE: []}
        for total, added, rest, product in [*rows_of_layers, whole]:
            both = math.sqrt(added) + math.sqrt(rest)
            norms = math.sqrt(total) * math.sqrt(rest)
            found[NORM].append(math.sqrt(total) / scale)
            found[SHARE].append(math.sqrt(added) / both if both else 0.0)
            found[COSINE].append(product / norms if norms else 0.0)
        return found

    def load(self) -> dict[str, list[float]]:
        """How evenly tokens were sent to experts since this was last called, by layer, and the mean over layers.

        Collective: all ranks call it. ``load_entropy`` is the entropy of the experts' shares over the largest that it
        can be, 1 for an even load; ``load_max_over_mean`` is the load of the busiest expert over the mean load.
        """
        known = {layer: record for layer, record in self._records.items() if record.experts is not None}
        if not known:
            return {}
        loads = torch.cat([record.read_load() for record in known.values()])
        _sum_over_ranks(loads)
        found: dict[str, list[float]] = {ENTROPY: [], MAXIMUM: []}
        parts = dict(zip(known, torch.split(loads, [record.experts or 0 for record in known.values()]), strict=True))
        for layer in self.layers:
            part = parts[layer].tolist() if layer in parts else []
            whole = sum(part)
            shares = [load / whole for load in part] if whole else []
            entropy = -sum(share * math.log(share) for share in shares if share)
            found[ENTROPY].append(entropy / math.log(len(shares)) if len(shares) > 1 else math.nan)
            found[MAXIMUM].append(max(shares) * len(shares) if shares else math.nan)
        for values in found.values():
            values.append(mean(values))
        return found

    def pairs_left_out(self) -> dict[str, list[float]]:
        """How many pairs of a token and an expert overflowed in float16 since this was last called, by layer, and all.

        Collective: all ranks call it. NaN where there were none.
        """
        counts = [layer.take_pairs_left_out() for layer in self.layers]
        (row,) = sum_over_ranks([[0.0 if count is None else float(count) for count in counts]])
        return {LEFT_OUT: [count or math.nan for count in [*row, sum(row)]]}


def named(layers: Sequence[DenseMixerLayer], values: dict[str, list[float]]) -> dict[str, float]:
    """The metrics as logs have them: ``densemixer/NAME`` over all layers, ``densemixer/layer_3/NAME`` for one.

    Args:
        layers: The layers. They have the number in their name, or their position where that isn't unique.
        values: For each metric the value of each layer, then the one over all; what is not a number is left out.
    """
    found = [re.search(r"\d+", layer.name) for layer in layers]
    numbers = [match.group() if match else "" for match in found]
    if "" in numbers or len(set(numbers)) < len(numbers):
        numbers = [str(position) for position in range(len(layers))]
    places = [*(f"layer_{number}/" for number in numbers), ""]
    return {
        f"{PREFIX}{place}{name}": value
        for name, column in values.items()
        for place, value in zip(places, column, strict=True)
        if not math.isnan(value)
    }


def mean(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def sum_over_ranks(rows: list[list[float]]) -> list[list[float]]:
    """Collective: all ranks call it with rows of the same lengths."""
    if _ranks() == 1:
        return rows
    # NCCL and its like exchange what is on their own devices.
    device = None if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator(check_available=True)
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    _sum_over_ranks(table)
    return table.tolist()


class _Record:
    """Of one layer, on this rank.

    Attributes:
        shape: [experts, hidden] of the router's weight, once it is known.
        experts: The number of experts, likewise.
        total: The sum of the weight's gradients.
        added: Of what DenseMixer adds to them.
    """

    def __init__(self, linear: bool, count: bool) -> None:
        self.linear, self.count = linear, count
        self.shape: tuple[int, int] | None = None
        self.experts: int | None = None
        self.device: torch.device | None = None
        self.total: Tensor | None = None
        self.added: Tensor | None = None
        self.loads: Tensor | None = None
        self._lock = threading.Lock()  # backwards may run in several threads

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

    def add_load(self, index: Tensor) -> None:
        assert self.experts is not None
        with self._lock:
            if self.loads is None:
                # The last one is for what is no expert of this process.
                self.loads = torch.zeros(self.experts + 1, device=index.device, dtype=torch.float64)
            index = index.flatten().clamp(max=self.experts)
            self.loads.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))

    def add_gradients(self, call: _Call, gradient: Tensor) -> None:
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


def _observe(
    layer: DenseMixerLayer, record: _Record, forward: Forward, output: Tensor, scores: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    x, router_output = forward.router_input, forward.router_output
    if x is None:
        return output, scores
    record.experts, record.device = router_output.shape[-1], x.device
    call = _Call()

    def carried(x: Tensor, index: Tensor, probabilities: Tensor | None) -> None:
        call.x, call.probabilities = x, probabilities
        if record.count:
            record.add_load(index)

    def added(gradient: Tensor) -> None:
        call.added = gradient

    if record.linear:
        record.shape = record.experts, x.shape[-1]
        # The gradient of the output's own tensor, whoever uses it. It keeps nothing alive: see `_Carry`.
        router_output.register_hook(lambda gradient: record.add_gradients(call, gradient))  # type: ignore[no-untyped-call]
        if scores is not None:
            scores = _Added.apply(scores, layer.score, added)  # type: ignore[no-untyped-call]
    probabilities = router_output.detach() if forward.probabilities else None
    return _Carry.apply(output, x.detach(), forward.index, probabilities, carried), scores  # type: ignore[no-untyped-call]


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


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_ranks(tensor: Tensor) -> None:
    if _ranks() > 1:
        dist.all_reduce(tensor)
