"""Methods of a host's objects that are overridden on these objects alone, and come back when that is undone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any


class Overrides:
    """Some methods, of one object or of several.

    Args:
        owners: Whose a method is, by its name.
    """

    def __init__(self, owners: Mapping[str, Any]) -> None:
        self._owners = dict(owners)
        self._ours: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}

    def put(self, ours: Mapping[str, Callable[..., Any]]) -> None:
        """Put these in their places. Who has overridden one of them before gets it back in `undo`."""
        self._ours = dict(ours)
        for name, method in self._ours.items():
            owner = self._owners[name]
            if name in vars(owner):
                self._before[name] = vars(owner)[name]
            setattr(owner, name, method)

    def undo(self) -> None:
        """Take away what is still ours. Does nothing the second time."""
        for name, method in self._ours.items():
            owner = self._owners[name]
            if vars(owner).get(name) == method:
                delattr(owner, name)
                if name in self._before:
                    setattr(owner, name, self._before[name])

    def host(self, name: str) -> Callable[..., Any]:
        """The method that is overridden, as it is now: others patch its class."""
        owner = self._owners[name]
        return self._before.get(name) or functools.partial(getattr(type(owner), name), owner)
