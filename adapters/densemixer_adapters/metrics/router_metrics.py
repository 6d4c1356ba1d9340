"""All router metrics of a training loop, measured in the order in which it goes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from densemixer_adapters.metrics.drift import Context, RoutingDrift
from densemixer_adapters.metrics.gradients import Measured, RouterMeter, named, sum_over_ranks
from densemixer_adapters.metrics.lost_updates import LostUpdates
from densemixer_adapters.metrics.names import NORM
from densemixer_adapters.transformers.layer import DenseMixerLayer

logger = logging.getLogger("densemixer")


class UnmeasuredError(RuntimeError):
    """Measuring failed, on this rank or on another. All ranks raise it alike, so none waits for the others in vain."""


def warn_unmeasured(error: Exception) -> None:
    """Log that measuring ends, which doesn't stop training."""
    reason = str(error) if isinstance(error, UnmeasuredError) else f"{type(error).__name__}: {error}"
    logger.warning(
        "DenseMixer: no router metrics from here on, since measuring them failed (%s). Training goes on.", reason
    )


class RouterMetrics:
    """Watches layers from now on: `start_step`, forwards and backwards, `before_update`, `after_update`, `measure`.

    Args:
        layers: The layers that DenseMixer is attached to.
        model: What is called with the batch, wrapped by FSDP if that is used.
        within: A context for comparing the routing, in which the routers choose by themselves.
    """

    def __init__(
        self, layers: Sequence[DenseMixerLayer], model: nn.Module, within: Context = contextlib.nullcontext
    ) -> None:
        self.layers = layers
        self._meter = RouterMeter(layers, load=True)
        self._drift = RoutingDrift(layers, model, within)
        self._lost = LostUpdates(layers)
        self._scale: float | None = 1.0
        self._failure: Exception | None = None  # since `measure`, on this rank

    def start_step(self) -> None:
        """Forget the gradients of the step before. Not needed where each step is measured."""
        self._meter.discard_gradients()

    def before_update(self, optimizer: Any | None, scale: float | None = 1.0) -> None:
        """Call it right before the optimizer's step.

        Args:
            optimizer: What will step; None if it has done so already, or steps copies of the parameters.
            scale: What the loss was multiplied by, for a gradient scaler; None if that isn't known.
        """
        self._scale = scale
        if optimizer is not None:
            with self._later():
                self._lost.before_step(optimizer)

    def after_update(self, skipped: bool = False) -> None:
        """Call it right after the optimizer's step.

        Args:
            skipped: Whether a gradient scaler has left the step out.
        """
        with self._later():
            self._lost.after_step(skipped)

    @contextlib.contextmanager
    def _later(self) -> Iterator[None]:
        """What fails on one rank alone is told to the others in `measure`, where all come together."""
        try:
            yield
        except Exception as error:
            self._failure = error

    def measure(self) -> dict[str, float]:
        """The metrics as logs have them, see `named`. Collective: all ranks call it, for a forward without gradients.

        Gradients and lost updates are those of the last step, with a norm of 0 where all routers are frozen. The load
        is that since this was last called, and the routing is compared with that at the start.

        Raises:
            UnmeasuredError: Something couldn't be measured since this was last called.
        """
        ((failures,),) = sum_over_ranks([[float(self._failure is not None)]])
        if failures:
            error, self._failure = self._failure, None
            raise UnmeasuredError("on another rank" if error is None else f"{type(error).__name__}: {error}") from error
        gradients = self._meter.gradients(1.0 if self._scale is None else self._scale)
        if self._scale is None:
            gradients.pop(NORM, None)
        if all(layer.router_is_frozen for layer in self.layers):
            gradients = {NORM: Measured([0.0] * len(self.layers), 0.0)}
        routing = self._meter.load() | self._drift.measure() | self._meter.pairs_left_out()
        return named(self.layers, gradients | routing | self._lost.measure())

    def remove(self) -> None:
        """Watch no longer."""
        self._meter.remove()
        self._drift.remove()
