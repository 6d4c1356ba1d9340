"""Where verl's engines with models of transformers build them and step: ``fsdp``, ``fsdp2`` and ``veomni``.

All have the key of `densemixer_adapters.verl`. The functions ``patch_…`` are called by the boot hook.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any

from densemixer_adapters.environment import left_alone
from densemixer_adapters.metrics.router_metrics import RouterMetrics, UnmeasuredError, warn_unmeasured
from densemixer_adapters.switch import wrap
from densemixer_adapters.transformers import DenseMixerHandle, attach, attached_handle, attached_layers
from densemixer_adapters.transformers.announce import describe
from densemixer_adapters.verl import SWITCH, options_of, says_anything
from densemixer_core import DenseMixerConfig


def patch_fsdp_engine(module: Any) -> None:
    """Attach DenseMixer where the engine builds its model, before LoRA and FSDP wrap it; measure where it steps."""
    engine = module.FSDPEngine

    @wrap(engine, "_build_module")
    def _build_module(original: Any, self: Any) -> Any:
        with left_to_the_key(self):
            model = original(self)
        if wanted(self) and self._qat_enabled:
            raise ValueError(f"{SWITCH} doesn't work with quantisation-aware training (qat.enable). Switch one off.")
        attach_to_model_of(self, model)
        return model

    @wrap(engine, "_build_fsdp_module")
    def _build_fsdp_module(original: Any, self: Any, model: Any) -> Any:
        # No error, even if all are frozen: LoRA on attention alone is training as without DenseMixer.
        handle = announced(self, model, "Set +…model.target_parameters=[{router}.weight] for this role to train them.")
        wrapped = original(self, model)
        if handle is not None and asks_for_metrics(self):
            # On the first micro-batch of what FSDP has wrapped, routing is compared.
            self._densemixer_metrics = RouterMetrics(handle.layers, wrapped)
        return wrapped

    wrap(engine, "optimizer_step")(measured_step)


def patch_veomni_engine(module: Any) -> None:
    """Attach DenseMixer before VeOmni spreads and shards the model; measure where the engine steps.

    The engine builds, spreads and shards its model in one method. In between, it always calls one more with the model
    as it was built.
    """
    engine = module.VeOmniEngine

    @wrap(engine, "_build_model_optimizer")
    def _build_model_optimizer(original: Any, self: Any) -> None:
        if wanted(self):
            _refuse_in_veomni(self)
        with left_to_the_key(self):
            original(self)
        if asks_for_metrics(self):
            self._densemixer_metrics = RouterMetrics(attached_layers(self.module), self.module, _without_replay)

    @wrap(engine, "_maybe_apply_async_activation_offload")
    def _maybe_apply_async_activation_offload(original: Any, self: Any, model: Any) -> None:
        attach_to_model_of(self, model)
        announced(self, model, "Call requires_grad_(True) on them.")
        original(self, model)

    wrap(engine, "optimizer_step")(measured_step)


def wanted(engine: Any) -> DenseMixerConfig | None:
    """The options of an engine that trains; None if DenseMixer is off for it.

    A reference policy is built from the actor's configuration, but only ever runs forward.
    """
    return None if engine.engine_config.forward_only else options_of(engine.model_config)


def asks_for_metrics(engine: Any) -> bool:
    """Whether the options of an engine do."""
    options = wanted(engine)
    return options is not None and options.metrics


def left_to_the_key(engine: Any) -> contextlib.AbstractContextManager[None]:
    """In it, models that are loaded aren't attached to by the environment, if our key is set for the engine."""
    return left_alone(says_anything(engine.model_config))


def attach_to_model_of(engine: Any, model: Any) -> None:
    """Attach DenseMixer to the model that an engine has built, if the engine wants it.

    Raises:
        ValueError: The model, or an option, isn't for DenseMixer. The message names the switch and the model.
    """
    options = wanted(engine)
    if options is None:
        return
    try:
        attach(model, options)
    except ValueError as error:
        raise type(error)(f"{SWITCH} for {engine.model_config.path}: {error}") from None


def announced(engine: Any, model: Any, fix: str) -> DenseMixerHandle | None:
    """Say what is attached to an engine's model, be it by the environment, and warn of routers that are frozen.

    Args:
        engine: The engine.
        model: Its model.
        fix: What to do about frozen routers.

    Returns:
        The handle; None if nothing is attached, or nothing trained.
    """
    handle = None if engine.engine_config.forward_only else attached_handle(model)
    if handle is None:
        return None
    handle.frozen_routers.fix = fix
    if wanted(engine) and engine.rank == 0:  # verl prints what it builds; its log level hides what isn't a warning
        print(describe(model, handle.layers))
    handle.frozen_routers.warn()
    return handle


def measured_step(original: Any, engine: Any) -> Any:
    """An optimizer step of an engine, measured if it asks for that."""
    metrics: RouterMetrics | None = getattr(engine, "_densemixer_metrics", None)
    if metrics is None:
        return original(engine)
    # The gradients are those before they are clipped, like verl's norm.
    scaler = getattr(engine, "scaler", None)
    metrics.before_update(engine.optimizer, 1.0 if scaler is None else scaler.get_scale())
    norm = original(engine)
    metrics.after_update(skipped=not math.isfinite(norm))
    try:
        engine._densemixer_measured = metrics.measure()
    except UnmeasuredError as error:
        metrics.remove()
        engine._densemixer_metrics, engine._densemixer_measured = None, {}
        warn_unmeasured(error)
    return norm


def _refuse_in_veomni(engine: Any) -> None:
    """Refuse settings with which the engine would train something else than it says, or other weights than it holds."""
    rank = engine.model_config.lora_rank
    if rank > 0:
        raise ValueError(
            f"{SWITCH}: verl's engine 'veomni' ignores lora_rank={rank} and trains all of the model's weights. Set "
            "lora_rank=0 for that, set strategy=fsdp2 for LoRA, or drop the key."
        )
    kind = engine.engine_config.qat_implementation
    if kind != "none":
        raise ValueError(
            f"{SWITCH} doesn't work with quantisation-aware training (qat_implementation={kind}). Switch one off."
        )


@contextlib.contextmanager
def _without_replay() -> Iterator[None]:
    """In it, routers choose by themselves: nobody records or replays what they choose."""
    replay = importlib.import_module("veomni.utils.moe_router_replay")
    active = replay.get_active_replay()
    replay.set_active_replay(None)
    try:
        yield
    finally:
        replay.set_active_replay(active)
