"""What attaching DenseMixer to a model returns, in every wing."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar


class Removable(Protocol):
    """A layer that DenseMixer is attached to."""

    def remove(self) -> None:
        """Leave the host's layer as it was. Does nothing the second time."""


LayerT = TypeVar("LayerT", bound=Removable)
HandleT = TypeVar("HandleT", bound="Handle[Any]")


class Handle(Generic[LayerT]):
    """What is attached to a model. Leaving it as a context manager, or `remove`, detaches it.

    Attributes:
        layers: The layers, in the model's order.
    """

    def __init__(self, layers: list[LayerT]) -> None:
        self.layers = layers

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.layers}>"

    def remove(self) -> None:
        """Leave the model as it was. Does nothing the second time."""
        for layer in self.layers:
            layer.remove()

    def __enter__(self: HandleT) -> HandleT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
