"""What a user is told of layers that have nothing to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from densemixer_adapters.transformers.announce import warn


class RouterOfLayer(Protocol):
    """What is asked of a layer."""

    router_name: str

    @property
    def router_is_frozen(self) -> bool: ...


class FrozenRouters:
    """Warns of the layers of one model whose routers are frozen.

    Args:
        layers: The layers to look at.
        fix: As below.

    Attributes:
        layers: As given.
        fix: What to do about it in the framework at hand, with ``{router}`` for the router's name in its layer; None
            where routers are frozen for a time only, which is no reason to warn.
    """

    def __init__(self, layers: Sequence[RouterOfLayer], fix: str) -> None:
        self.layers = layers
        self.fix: str | None = fix
        self._known: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, of which nothing was said yet."""
        return {**vars(self), "_known": set()}

    def warn(self) -> None:
        """Log one warning, on the first rank, for all routers that are frozen now, but once for each."""
        if self.fix is None:
            return
        frozen = [layer.router_name for layer in self.layers if layer.router_is_frozen]
        new = [name for name in frozen if name not in self._known]
        if not new:
            return
        self._known.update(new)
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        fix = self.fix.format(router=".".join(new[0].split(".")[-2:]))
        warn(
            f"DenseMixer has nothing to train in {len(frozen)} of {len(self.layers)} layers, whose routers are frozen "
            f"({new[0]}{more}): such a layer trains as without DenseMixer. {fix}"
        )

    def warn_of(self, layer: RouterOfLayer) -> None:
        """The same, in a forward of a layer whose router is frozen: the others are looked at if this one is new."""
        if layer.router_name not in self._known:
            self.warn()
