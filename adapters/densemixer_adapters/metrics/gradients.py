"""Router metrics of a model: what each layer's meter found on each rank, taken together.

The gradient of the routers, the part that DenseMixer adds, and the experts' load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from densemixer_adapters.metrics.layer_meter import LayerMeter, Watched
from densemixer_adapters.metrics.names import COSINE, ENTROPY, LEFT_OUT, MAXIMUM, NORM, PREFIX, SHARE

_T = TypeVar("_T")


class Measured(NamedTuple):
    """One metric; NaN where there is none.

    Attributes:
        layers: Of each layer.
        whole: Over all of them.
    """

    layers: list[float]
    whole: float


class Ranks(Protocol):
    """How a model and its tokens are spread over ranks. Its methods but `divisor` are collective."""

    def sum(self, tensor: Tensor) -> None:
        """Over all ranks that hold these layers, in place."""

    def divisor(self, position: int) -> float:
        """What that sum of the gradients of a layer is divided by to be the one that the optimizer gets."""

    def all_layers(self, ours: list[_T]) -> list[_T]:
        """From one for each layer of this rank to one for each layer of the model."""


class World:
    """All layers are on all ranks, each of which has tokens of its own, as with DDP, FSDP and ZeRO."""

    def sum(self, tensor: Tensor) -> None:
        _sum_over_ranks(tensor)

    def divisor(self, position: int) -> float:
        return _ranks()

    def all_layers(self, ours: list[_T]) -> list[_T]:
        return ours


class RouterMeter:
    """Measures between two optimizer steps.

    The gradient is that of the router's weight; of the product with its adapter included, where LoRA trains it. Routers
    that don't multiply their input by one weight have none here, and neither have frozen ones.

    Args:
        layers: The layers, on this rank. They must not be watched already, unless by the meters that are given.
        load: Whether to count the experts' load too.
        meters: What watches them already; by default they are watched from now on.
        ranks: How layers and tokens are spread over ranks.
    """

    def __init__(
        self,
        layers: Sequence[Watched],
        load: bool = False,
        meters: Sequence[LayerMeter] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.layers = layers
        self._meters = [LayerMeter(layer, load) for layer in layers] if meters is None else meters
        self._ranks = ranks or World()

    def remove(self) -> None:
        """Watch no longer."""
        for layer in self.layers:
            layer.observer = None

    def discard_gradients(self) -> None:
        """Forget the gradients since the last step; the load goes on being counted."""
        for meter in self._meters:
            meter.discard_gradients()

    def gradients(self, scale: float = 1.0) -> dict[str, Measured]:
        """The gradients since they were last discarded or read, as the optimizer gets them.

        Collective: all ranks call it.

        Args:
            scale: What the loss was multiplied by, for a gradient scaler.

        Returns:
            ``router_grad_norm`` is the norm of the gradient G, ``router_grad_share_unselected`` is
            ‖A‖ / (‖A‖ + ‖G − A‖) for the part A that DenseMixer adds, and ``router_grad_cosine_conventional`` is the
            cosine of G and G − A. Nothing if no router had a gradient.
        """
        rows = self._ranks.all_layers(self._squares())
        known = [row for row in rows if row is not None]
        if not known:
            return {}
        whole = _of_squares([sum(column) for column in zip(*known, strict=True)], scale)
        layers = [_of_squares(row or [math.nan] * 4, scale) for row in rows]
        return {name: Measured([layer[name] for layer in layers], whole[name]) for name in whole}

    def _squares(self) -> list[list[float] | None]:
        """‖G‖², ‖A‖², ‖G − A‖² and ⟨G, G − A⟩ of each layer of this rank; None where there is no gradient."""
        rows = {}
        for position, meter in enumerate(self._meters):
            if meter.shape is None:
                continue
            sums = meter.read()
            self._ranks.sum(sums)
            total, added = sums.double().flatten(1) / self._ranks.divisor(position)
            rest = total - added
            rows[position] = torch.stack([total.dot(total), added.dot(added), rest.dot(rest), total.dot(rest)])
        if not rows:
            return [None] * len(self._meters)
        squares = dict(zip(rows, torch.stack(list(rows.values())).tolist(), strict=True))
        return [squares.get(position) for position in range(len(self._meters))]

    def load(self) -> dict[str, Measured]:
        """How evenly tokens were sent to experts since this was last called, by layer, and the mean over layers.

        Collective: all ranks call it. ``load_entropy`` is the entropy of the experts' shares over the largest that it
        can be, 1 for an even load; ``load_max_over_mean`` is the load of the busiest expert over the mean load.
        """
        rows = self._ranks.all_layers(self._loads())
        if not any(row is not None for row in rows):
            return {}
        found: dict[str, list[float]] = {ENTROPY: [], MAXIMUM: []}
        for row in rows:
            whole = sum(row or ())
            shares = [load / whole for load in row or ()] if whole else []
            entropy = -sum(share * math.log(share) for share in shares if share)
            found[ENTROPY].append(entropy / math.log(len(shares)) if len(shares) > 1 else math.nan)
            found[MAXIMUM].append(max(shares) * len(shares) if shares else math.nan)
        return {name: Measured(values, mean(values)) for name, values in found.items()}

    def _loads(self) -> list[list[float] | None]:
        """The number of tokens of each expert, for each layer of this rank; None where it isn't known."""
        known = [meter for meter in self._meters if meter.experts is not None]
        if not known:
            return [None] * len(self._meters)
        loads = torch.cat([meter.read_load() for meter in known])
        self._ranks.sum(loads)
        parts = iter(torch.split(loads, [meter.experts or 0 for meter in known]))
        return [None if meter.experts is None else next(parts).tolist() for meter in self._meters]

    def pairs_left_out(self) -> dict[str, Measured]:
        """How many pairs of a token and an expert overflowed in float16 since this was last called, by layer, and all.

        Collective: all ranks call it. NaN where there were none.
        """
        counts = [layer.take_pairs_left_out() for layer in self.layers]
        ours = [0.0 if count is None else float(count) for count in counts]
        if ours:
            table = torch.tensor(ours, dtype=torch.float64, device=_exchange_device())
            self._ranks.sum(table)
            ours = table.tolist()
        row = self._ranks.all_layers(ours)
        return {LEFT_OUT: Measured([count or math.nan for count in row], sum(row) or math.nan)}


def named(layers: Sequence[Watched], values: Mapping[str, Measured]) -> dict[str, float]:
    """The metrics as logs have them: ``densemixer/NAME`` over all layers, ``densemixer/layer_3/NAME`` for one.

    Args:
        layers: The layers. They have the number in their name, or their position where that isn't unique.
        values: The metrics; what is not a number is left out.
    """
    found = [re.search(r"\d+", layer.name) for layer in layers]
    numbers = [match.group() if match else "" for match in found]
    if "" in numbers or len(set(numbers)) < len(numbers):
        numbers = [str(position) for position in range(len(layers))]
    return at_places([f"layer_{number}" for number in numbers], values)


def at_places(places: Sequence[str], values: Mapping[str, Measured]) -> dict[str, float]:
    """As `named`, for layers that are called so."""
    found = {
        f"{PREFIX}{place}{name}": value
        for name, measured in values.items()
        for place, value in [
            *zip([f"{place}/" for place in places], measured.layers, strict=True),
            ("", measured.whole),
        ]
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _of_squares(row: list[float], scale: float) -> dict[str, float]:
    """The metrics of gradients, from what `RouterMeter` makes of these."""
    total, added, rest, product = row
    both, norms = math.sqrt(added) + math.sqrt(rest), math.sqrt(total) * math.sqrt(rest)
    return {
        NORM: math.sqrt(total) / scale,
        SHARE: math.sqrt(added) / both if both else 0.0,
        COSINE: product / norms if norms else 0.0,
    }


def mean(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def sum_over_ranks(rows: list[list[float]]) -> list[list[float]]:
    """Collective: all ranks call it with rows of the same lengths."""
    if _ranks() == 1:
        return rows
    table = torch.tensor(rows, dtype=torch.float64, device=_exchange_device())
    _sum_over_ranks(table)
    return table.tolist()


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_ranks(tensor: Tensor) -> None:
    if _ranks() > 1:
        dist.all_reduce(tensor)


def _exchange_device() -> torch.device | None:
    """NCCL and its like exchange what is on their own devices."""
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return None
    return torch.accelerator.current_accelerator(check_available=True)
