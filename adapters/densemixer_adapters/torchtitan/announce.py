"""What a user is told of frozen routers: when DenseMixer is attached, and in a training forward after that."""

from __future__ import annotations

from collections.abc import Sequence

from densemixer_adapters.transformers.announce import warn


class FrozenRouters:
    """Warns, on the first rank, of layers that have nothing to train. Shared by the layers of one attach."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._warned_later = False

    def when_attaching(self, frozen: Sequence[str], count: int) -> None:
        """Log one warning, if there are any.

        Args:
            frozen: The names of the layers whose router is frozen.
            count: How many layers DenseMixer is attached to.
        """
        self._known.update(frozen)
        if frozen:
            _warn(f"in {len(frozen)} of {count} layers, from {_shown(frozen[0])} on")

    def in_a_forward(self, name: str) -> None:
        """Log one warning for all layers, of the first that wasn't frozen before. ``name`` is the layer's."""
        if name not in self._known and not self._warned_later:
            self._warned_later = True
            _warn(f"first in {_shown(name)}")


def _shown(name: str) -> str:
    return name or "the model itself"


def _warn(where: str) -> None:
    warn(
        f"DenseMixer has nothing to train where routers are frozen, {where}: such a layer trains as without "
        "DenseMixer. Call requires_grad_(True) on its router after whatever froze it, e.g. a LoRA converter."
    )
