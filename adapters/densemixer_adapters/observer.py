"""What a layer of DenseMixer, of whatever framework, tells of a training forward and of its backward."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Forward:
    """What a training forward of a layer did, for an observer.

    Attributes:
        router_input: The router's input, [..., hidden]; None if it was called without positional arguments.
        router_output: The tensor that the router returned, [..., experts].
        probabilities: Whether that has been through a softmax already.
        x: The experts' input, [..., hidden].
        index: The selected experts, [tokens, k].
        weights: The weights that the layer gave them, [tokens, k].
    """

    router_input: Tensor | None
    router_output: Tensor
    probabilities: bool
    x: Tensor
    index: Tensor
    weights: Tensor


Observer = Callable[[Forward, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Called in each training forward, whatever the estimator, with the experts' output, [..., hidden], and the scores,
[tokens, experts]; None for those if DenseMixer adds nothing. What it returns takes their places, that of the scores for
DenseMixer alone: the gradient that comes back there is the one that DenseMixer adds."""

_lock = threading.Lock()


class PairsLeftOut:
    """Counts pairs of a token and an expert that overflowed in float16. Backwards may run in several threads."""

    def __init__(self) -> None:
        self._count: Tensor | None = None

    def add(self, count: Tensor) -> None:
        """Count some more, a scalar, without waiting for the device."""
        with _lock:
            self._count = count if self._count is None else self._count + count

    def take(self) -> Tensor | None:
        """How many there were since this was last called, a scalar; None if nothing was counted."""
        with _lock:
            count, self._count = self._count, None
        return count
