"""Router metrics in the log of the HF Trainer, and so in ``trainer_state.json``, TensorBoard and W&B.

``Trainer(..., callbacks=[DenseMixerCallback()])`` for a model that DenseMixer is attached to. Where a program's own
source isn't touched, the option ``metrics`` has `patch_trainer` add it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
import transformers.trainer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from densemixer_adapters.metrics.names import PREFIX
from densemixer_adapters.metrics.router_metrics import RouterMetrics, UnmeasuredError, warn_unmeasured
from densemixer_adapters.metrics.verdict import judge
from densemixer_adapters.switch import is_wrapped, wrap
from densemixer_adapters.transformers import attached_layers

logger = logging.getLogger("densemixer")


class DenseMixerCallback(TrainerCallback):  # type: ignore[misc]  # skipped
    """Adds the router metrics to each of the Trainer's logs of a training step.

    Gradients and lost updates are those of the log's last step, the load is that of all steps since the log before, and
    the routing is compared with that at the start of ``train()``. Each log costs one more forward, without gradients,
    of one micro-batch. Progress bars print the metrics over all layers alone.

    Training is the same bit for bit, with it and without. However ``train()`` ends, Trainer and model are left as they
    were. If measuring fails, it ends with a warning on all ranks, and training goes on. An error in what ranks do
    together, as the forward of the log, is one of training too.
    """

    def __init__(self) -> None:
        patch_trainer(transformers.trainer)
        self._metrics: RouterMetrics | None = None
        self._due: dict[str, float] = {}
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._first_step = 0
        self._last_step = -1
        self._original_log: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Start to watch.

        Raises:
            ValueError: DenseMixer isn't attached to the model.
        """
        self.close()
        layers = [] if model is None else attached_layers(model)
        if model is None or not layers:
            raise ValueError(
                f"DenseMixerCallback: DenseMixer is not attached to {type(model).__name__}, so there is nothing to "
                "measure. Call apply_densemixer(model) before Trainer.train, or leave the callback out."
            )
        self._metrics = RouterMetrics(layers, model)
        self._curves, self._first_step, self._last_step = {}, state.global_step, -1
        self._original_log = Trainer.log
        _add_metrics_to_log()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self._observing() as metrics:
            if metrics is not None:
                metrics.start_step()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        with self._observing() as metrics:
            if metrics is None:
                return
            if type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
                # It has stepped already, by copies in float32. For fp16 it scales the loss by a factor of its own, and
                # may have changed that by now.
                metrics.before_update(None, None if args.fp16 else 1.0)
                return
            scaler = getattr(optimizer, "scaler", None)
            metrics.before_update(optimizer, 1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        with self._observing() as metrics:
            if metrics is not None:
                metrics.after_update(skipped=bool(getattr(optimizer, "step_was_skipped", False)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log:
            self._measure(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_log:
            self._measure(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Those that report have had their turn; of what comes next, progress bars print all that is left.
        for name in [name for name in logs or {} if name.startswith(f"{PREFIX}layer_")]:
            del logs[name]  # type: ignore[union-attr]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if DenseMixer has done nothing, and stop watching."""
        if self._last_step < state.global_step:
            self._measure(state)
        verdict = judge(self._curves)
        if state.is_world_process_zero and verdict.works is False:
            logger.warning("%s.", verdict.text)
        self.close()

    def take(self) -> dict[str, float]:
        """What is to be logged and hasn't been yet."""
        due, self._due = self._due, {}
        return due

    def close(self) -> None:
        """Stop watching, and leave model and Trainer as they were."""
        if self._metrics is not None:
            self._metrics.remove()
        if self._original_log is not None and getattr(Trainer.log, "__wrapped__", None) is self._original_log:
            Trainer.log = self._original_log
        self._metrics = self._original_log = None
        self._due = {}

    def _measure(self, state: TrainerState) -> None:
        if self._last_step == state.global_step:
            return
        with self._observing() as metrics:
            if metrics is not None:
                self._due = metrics.measure()
                self._last_step = state.global_step
                for name, value in self._due.items():
                    if "/" not in (metric := name.removeprefix(PREFIX)):  # over all layers
                        self._curves.setdefault(metric, []).append((state.global_step - self._first_step, value))

    @contextlib.contextmanager
    def _observing(self) -> Iterator[RouterMetrics | None]:
        """An observer doesn't stop training."""
        try:
            yield self._metrics
        except Exception as error:
            together = not isinstance(error, UnmeasuredError)
            if together and dist.is_initialized() and dist.get_world_size() > 1:
                raise
            self.close()
            warn_unmeasured(error)


def patch_trainer(module: Any) -> None:
    """Have the Trainer add the callback where a layer has the option ``metrics``, and close it however training ends.

    Args:
        module: ``transformers.trainer``.
    """
    if is_wrapped(module.Trainer.train):
        return

    @wrap(module.Trainer, "train")
    def train(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        callbacks = self.callback_handler.callbacks
        added = []
        wanted = any(layer.config.metrics for layer in attached_layers(self.model))
        if wanted and not any(isinstance(callback, DenseMixerCallback) for callback in callbacks):
            printers = [
                p for p, callback in enumerate(callbacks) if isinstance(callback, PrinterCallback | ProgressCallback)
            ]
            added.append(DenseMixerCallback())
            callbacks.insert(printers[0] if printers else len(callbacks), added[0])
        try:
            return original(self, *args, **kwargs)
        finally:
            for callback in callbacks:
                if isinstance(callback, DenseMixerCallback):
                    callback.close()
            for callback in added:
                callbacks.remove(callback)


def _add_metrics_to_log() -> None:
    """Have ``Trainer.log`` add what is due. A callback can't do that: those before it have seen the log already."""

    @wrap(Trainer, "log")
    def log(original: Any, self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, DenseMixerCallback):
                logs.update(callback.take())
        original(self, logs, *args, **kwargs)
