"""DenseMixer in verl: ``+actor_rollout_ref.model.override_config.densemixer=true`` on the command line.

``+critic.model.…`` does the same for the critic and ``+model.…`` for the SFT trainers. Instead of ``true``, a mapping
with the fields of `densemixer_core.DenseMixerConfig` gives options; ``false`` says no to ``DENSEMIXER_ENABLED=1`` too.
The engines ``fsdp`` and ``fsdp2`` are served. The engine ``megatron`` has the field of `densemixer_adapters.megatron`
in ``…megatron.override_transformer_config``.

Each update's metrics have the norm of the routers' gradient and the share of unselected experts in it; with the option
``metrics`` all router metrics, by layer too, for one forward more of a micro-batch, without gradients. The engine
``megatron`` has metrics with that option alone, those that need no further forward.

verl trains in Ray workers, so a patch made in the process that starts them doesn't reach them. The functions
``patch_…`` are called by the boot hook (`densemixer_adapters._boot`), in every process, each right after its module of
verl was imported. Importing this module puts that hook in place where it isn't yet. verl does so by itself (entry point
``verl.plugins``); ``…model.external_lib=densemixer_adapters.verl`` serves where this package can be imported but is not
installed. Once is enough: whoever comes second finds the hook in place.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from densemixer_adapters import _boot
from densemixer_adapters.announce import describe
from densemixer_adapters.environment import left_alone
from densemixer_adapters.megatron import FLAG as MEGATRON_FLAG
from densemixer_adapters.megatron import attached as attached_to_megatron
from densemixer_adapters.megatron import wants_metrics
from densemixer_adapters.metric_names import NORM, PREFIX, SHARE
from densemixer_adapters.metrics import RouterMeter
from densemixer_adapters.router_metrics import RouterMetrics, UnmeasuredError, warn_unmeasured
from densemixer_adapters.switch import read_switch, wrap
from densemixer_adapters.transformers import DenseMixerLayer, attach, attached_handle
from densemixer_core import DenseMixerConfig

KEY = "densemixer"
SWITCH = f"override_config.{KEY}"
ENGINES = ("fsdp", "fsdp2")


class UpdateMetrics:
    """What an engine measures of its routers.

    Args:
        layers: The layers that DenseMixer is attached to.
        all: Whether to measure all there is.

    Attributes:
        measured: The metrics of the last update.
    """

    def __init__(self, layers: list[DenseMixerLayer], all: bool) -> None:
        self.layers, self.all = layers, all
        self.measured: dict[str, float] = {}
        self._meter: RouterMeter | None = None
        self._metrics: RouterMetrics | None = None

    def watch(self, model: nn.Module) -> None:
        """Start to measure. Routing is compared on the first micro-batch of ``model``, which is wrapped by FSDP."""
        if self.all:
            self._metrics = RouterMetrics(self.layers, model)
        else:
            self._meter = RouterMeter(self.layers)

    def around_step(self, engine: Any, step: Callable[[Any], float]) -> float:
        """Take an optimizer step, and set `measured`. Gradients are those before they are clipped, like verl's norm."""
        scale = 1.0 if engine.scaler is None else engine.scaler.get_scale()
        if self._meter is not None:
            gradients = self._meter.gradients(scale)
            values = {name: gradients[name][-1] for name in (NORM, SHARE) if name in gradients}
            self.measured = {PREFIX + name: value for name, value in values.items() if not math.isnan(value)}
        if self._metrics is None:
            return step(engine)
        self._metrics.before_update(engine.optimizer, scale)
        norm = step(engine)
        self._metrics.after_update(skipped=not math.isfinite(norm))
        try:
            self.measured = self._metrics.measure()
        except UnmeasuredError as error:
            self._metrics.remove()
            self._metrics, self.measured = None, {}
            warn_unmeasured(error)
        return norm


def read_options(override_config: Mapping[str, Any]) -> DenseMixerConfig | None:
    """The options in a model's ``override_config``, or in ``model_config`` therein; None where DenseMixer is off.

    Raises:
        ValueError: Our key's value or an option is wrong, or a key looks like a misspelling of ours.
    """
    for key in (key for place in _places(override_config) for key in place):
        if key != KEY and _looks_like_our_key(key):
            raise ValueError(f"override_config.{key}: no such key; did you mean {SWITCH}?")
    return read_switch(SWITCH, _value(override_config))


def patch_config(module: Any) -> None:
    """Refuse our key where nobody would read it, before anything is started. PPO and GRPO check their options here."""

    @wrap(module, "validate_config")
    def validate_config(original: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        from omegaconf import OmegaConf

        for path in _misplaced(OmegaConf.to_container(config)):
            raise ValueError(
                f"{path}: nobody reads it there. DenseMixer's key is +actor_rollout_ref.model.{SWITCH} for the actor "
                f"and +critic.model.{SWITCH} for the critic."
            )
        return original(config, *args, **kwargs)


def _misplaced(options: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The paths of what looks like our key, or Megatron Core's field, somewhere else than these belong."""
    for key, value in options.items() if isinstance(options, Mapping) else ():
        here = (*path, str(key))
        if key == MEGATRON_FLAG and path and path[-1] == "override_transformer_config":
            continue
        if _looks_like_our_key(key) and "override_config" not in path[-2:]:
            yield ".".join(here)
        yield from _misplaced(value, here)


def patch_metric_utils(module: Any) -> None:
    """Keep our key out of the model configuration that verl's metrics look at."""
    module.update_model_config = _without_our_key(module.update_model_config)


def patch_model_config(module: Any) -> None:
    """Keep our key out of the model's configuration, and so of checkpoints, and have it travel with verl's."""
    module.update_model_config = _without_our_key(module.update_model_config)
    config_class = module.HFModelConfig
    original, build = config_class.__reduce_ex__, config_class.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        for key in filter(_looks_like_our_key, kwargs):
            raise ValueError(f"model.{key}: no such key; did you mean model.{SWITCH}?")
        build(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        # The driver builds the critic's configuration and sends it to the workers, which then don't import
        # `external_lib`: let unpickling import this module.
        return (
            (_rebuild, (type(self), self.__dict__)) if read_options(self.override_config) else original(self, protocol)
        )

    config_class.__init__ = __init__
    config_class.__reduce_ex__ = __reduce_ex__


def patch_engine_registry(module: Any) -> None:
    """Refuse engines that we don't serve, before they are built."""
    registry = module.EngineRegistry
    original = registry.new

    @functools.wraps(original)
    def new(model_type: str, backend: str, *args: Any, **kwargs: Any) -> Any:
        model, engine = kwargs.get("model_config"), kwargs.get("engine_config")
        wanted = model is not None and engine is not None and not engine.forward_only and _options(model)
        if wanted and backend not in ENGINES:
            if backend == "megatron":
                raise ValueError(
                    f"{SWITCH}: verl's engine 'megatron' has a switch of its own, a field of Megatron Core's "
                    f"configuration. Replace this one by +…megatron.override_transformer_config.{MEGATRON_FLAG}=true."
                )
            raise ValueError(
                f"{SWITCH}: verl's engine {backend!r} is not supported, only {' and '.join(ENGINES)} and megatron. "
                f"Either set strategy=fsdp2 for this role, or drop {SWITCH}."
            )
        return original(model_type, backend, *args, **kwargs)

    registry.new = staticmethod(new)


def patch_fsdp_engine(module: Any) -> None:
    """Attach DenseMixer where the engine builds its model, before LoRA and FSDP wrap it; measure where it steps."""
    engine = module.FSDPEngine
    build, build_fsdp, step = engine._build_module, engine._build_fsdp_module, engine.optimizer_step

    @functools.wraps(build)
    def _build_module(self: Any) -> Any:
        ours = _value(_override_config(self.model_config)) is not None
        with left_alone(ours):
            model = build(self)
        # A reference policy is built from the actor's configuration, but only ever runs forward.
        options = None if self.engine_config.forward_only else _options(self.model_config)
        if options is None:
            return model
        if self._qat_enabled:
            raise ValueError(f"{SWITCH} doesn't work with quantisation-aware training (qat.enable). Switch one off.")
        try:
            self._densemixer = UpdateMetrics(attach(model, options).layers, options.metrics)
        except ValueError as error:
            raise type(error)(f"{SWITCH} for {self.model_config.path}: {error}") from None
        return model

    @functools.wraps(build_fsdp)
    def _build_fsdp_module(self: Any, model: Any) -> Any:
        attached, handle = _attached(self), attached_handle(model)
        if (
            attached is not None and self.rank == 0
        ):  # verl prints what it builds; its log level hides what isn't a warning
            print(describe(model, attached.layers))
        if handle is not None and not self.engine_config.forward_only:
            # No error, even if all are frozen: LoRA on attention alone is training as without DenseMixer.
            handle.frozen_routers.fix = "Set +…model.target_parameters=[{router}.weight] for this role to train them."
            handle.warn_of_frozen_routers()
        model = build_fsdp(self, model)
        if attached is not None:
            attached.watch(model)
        return model

    @functools.wraps(step)
    def optimizer_step(self: Any) -> Any:
        attached = _attached(self)
        return step(self) if attached is None else attached.around_step(self, step)

    engine._build_module = _build_module
    engine._build_fsdp_module = _build_fsdp_module
    engine.optimizer_step = optimizer_step


def patch_megatron_engine(module: Any) -> None:
    """Measure where the engine steps. Its model has DenseMixer by its configuration."""
    engine = module.MegatronEngine
    step = engine.optimizer_step

    @functools.wraps(step)
    def optimizer_step(self: Any) -> Any:
        norm = step(self)
        if wants_metrics(self.module):
            self._densemixer_measured = attached_to_megatron(self.module).metrics()
        return norm

    engine.optimizer_step = optimizer_step


def patch_training_worker(module: Any) -> None:
    """Report the measurements beside verl's own metrics of an update."""
    worker = module.TrainingWorker
    original = worker._postprocess_output

    @functools.wraps(original)
    def _postprocess_output(self: Any, output: Any, *, forward_only: bool, **kwargs: Any) -> Any:
        result = original(self, output, forward_only=forward_only, **kwargs)
        measured = _measured(self.engine)
        if measured and not forward_only:
            result.set_non_tensor("metrics", {**result["metrics"], **measured})
        return result

    worker._postprocess_output = _postprocess_output


def _looks_like_our_key(key: Any) -> bool:
    return bool(difflib.get_close_matches(str(key).lower(), [KEY, f"use_{KEY}"], cutoff=0.8))


def _options(model_config: Any) -> DenseMixerConfig | None:
    return read_options(_override_config(model_config))


def _override_config(model_config: Any) -> Mapping[str, Any]:
    return getattr(model_config, "override_config", None) or {}


def _places(override_config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [override_config, override_config.get("model_config") or {}]


def _value(override_config: Mapping[str, Any]) -> Any:
    return next((place[KEY] for place in _places(override_config) if KEY in place), None)


def _attached(engine: Any) -> UpdateMetrics | None:
    return getattr(engine, "_densemixer", None)


def _measured(engine: Any) -> dict[str, float]:
    attached = _attached(engine)
    measured: dict[str, float] = getattr(engine, "_densemixer_measured", {}) if attached is None else attached.measured
    return measured


def _without_our_key(update: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(update)
    def update_model_config(module_config: Any, override_config_kwargs: Mapping[str, Any]) -> None:
        read_options(override_config_kwargs)  # a wrong option is an error in whatever process reads it first
        update(module_config, {key: value for key, value in override_config_kwargs.items() if key != KEY})

    return update_model_config


def _rebuild(config_class: Any, state: dict[str, Any]) -> Any:
    config = config_class.__new__(config_class)
    config.__dict__.update(state)
    return config


_boot.install()
_boot.patch_imported()
