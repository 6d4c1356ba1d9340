"""DenseMixer in verl: ``+actor_rollout_ref.model.override_config.densemixer=true`` on the command line.

``+critic.model.…`` does the same for the critic and ``+model.…`` for the SFT trainers. Instead of ``true``, a mapping
with the fields of `densemixer_core.DenseMixerConfig` gives options; ``false`` says no to ``DENSEMIXER_ENABLED=1`` too.
The engines ``fsdp``, ``fsdp2`` and ``automodel`` (`densemixer_adapters.automodel`) are served. The engine ``megatron``
has the field of `densemixer_adapters.megatron` in ``…megatron.override_transformer_config``.

With the option ``metrics`` each update's metrics have the router metrics, by layer too, for one forward more of a
micro-batch, without gradients. The engine ``megatron`` has those that need no further forward.

verl trains in Ray workers, so a patch made in the process that starts them doesn't reach them. The functions
``patch_…`` are called by the boot hook (`densemixer_adapters._boot`), in every process, each right after its module of
verl was imported. Importing this module puts that hook in place where it isn't yet. verl does so by itself (entry point
``verl.plugins``); ``…model.external_lib=densemixer_adapters.verl`` serves where this package can be imported but is not
installed. Once is enough: whoever comes second finds the hook in place.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from densemixer_adapters import _boot
from densemixer_adapters.environment import left_alone
from densemixer_adapters.megatron import FLAG as MEGATRON_FLAG
from densemixer_adapters.megatron import attached as attached_to_megatron
from densemixer_adapters.megatron import wants_metrics
from densemixer_adapters.metrics.router_metrics import RouterMetrics, UnmeasuredError, warn_unmeasured
from densemixer_adapters.switch import read_switch, wrap
from densemixer_adapters.transformers import attach, attached_handle
from densemixer_adapters.transformers.announce import describe
from densemixer_core import DenseMixerConfig

KEY = "densemixer"
SWITCH = f"override_config.{KEY}"
ENGINES = ("automodel", "fsdp", "fsdp2")


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
    wrap(module, "update_model_config")(_without_our_key)


def patch_model_config(module: Any) -> None:
    """Keep our key out of the model's configuration, and so of checkpoints, and have it travel with verl's."""
    wrap(module, "update_model_config")(_without_our_key)

    @wrap(module.HFModelConfig, "__init__")
    def __init__(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        for key in filter(_looks_like_our_key, kwargs):
            raise ValueError(f"model.{key}: no such key; did you mean model.{SWITCH}?")
        original(self, *args, **kwargs)

    @wrap(module.HFModelConfig, "__reduce_ex__")
    def __reduce_ex__(original: Any, self: Any, protocol: Any) -> Any:  # noqa: N807
        # The driver builds the critic's configuration and sends it to the workers, which then don't import
        # `external_lib`: let unpickling import this module.
        ours = read_options(self.override_config)
        return (_rebuild, (type(self), self.__dict__)) if ours else original(self, protocol)


def patch_engine_registry(module: Any) -> None:
    """Refuse engines that we don't serve, before they are built."""

    @wrap(module.EngineRegistry, "new")
    def new(original: Any, cls: type, model_type: str, backend: str, *args: Any, **kwargs: Any) -> Any:
        model, engine = kwargs.get("model_config"), kwargs.get("engine_config")
        wanted = model is not None and engine is not None and not engine.forward_only and _options(model)
        if wanted and backend not in ENGINES:
            if backend == "megatron":
                raise ValueError(
                    f"{SWITCH}: verl's engine 'megatron' has a switch of its own, a field of Megatron Core's "
                    f"configuration. Replace this one by +…megatron.override_transformer_config.{MEGATRON_FLAG}=true."
                )
            raise ValueError(
                f"{SWITCH}: verl's engine {backend!r} is not supported, only {', '.join(ENGINES)} and megatron. "
                f"Either set strategy=fsdp2 for this role, or drop {SWITCH}."
            )
        return original(cls, model_type, backend, *args, **kwargs)


def patch_fsdp_engine(module: Any) -> None:
    """Attach DenseMixer where the engine builds its model, before LoRA and FSDP wrap it; measure where it steps."""
    engine = module.FSDPEngine

    @wrap(engine, "_build_module")
    def _build_module(original: Any, self: Any) -> Any:
        with left_alone(_value(_override_config(self.model_config)) is not None):
            model = original(self)
        # A reference policy is built from the actor's configuration, but only ever runs forward.
        options = None if self.engine_config.forward_only else _options(self.model_config)
        if options is None:
            return model
        if self._qat_enabled:
            raise ValueError(f"{SWITCH} doesn't work with quantisation-aware training (qat.enable). Switch one off.")
        try:
            attach(model, options)
        except ValueError as error:
            raise type(error)(f"{SWITCH} for {self.model_config.path}: {error}") from None
        return model

    @wrap(engine, "_build_fsdp_module")
    def _build_fsdp_module(original: Any, self: Any, model: Any) -> Any:
        handle = None if self.engine_config.forward_only else attached_handle(model)
        if handle is None:
            return original(self, model)
        # No error, even if all are frozen: LoRA on attention alone is training as without DenseMixer.
        handle.frozen_routers.fix = "Set +…model.target_parameters=[{router}.weight] for this role to train them."
        ours = _options(self.model_config)
        if ours and self.rank == 0:  # verl prints what it builds; its log level hides what isn't a warning
            print(describe(model, handle.layers))
        handle.warn_of_frozen_routers()
        wrapped = original(self, model)
        if ours and ours.metrics:
            # On the first micro-batch of what FSDP has wrapped, routing is compared.
            self._densemixer_metrics = RouterMetrics(handle.layers, wrapped)
        return wrapped

    @wrap(engine, "optimizer_step")
    def optimizer_step(original: Any, self: Any) -> Any:
        metrics: RouterMetrics | None = getattr(self, "_densemixer_metrics", None)
        if metrics is None:
            return original(self)
        # The gradients are those before they are clipped, like verl's norm.
        metrics.before_update(self.optimizer, 1.0 if self.scaler is None else self.scaler.get_scale())
        norm = original(self)
        metrics.after_update(skipped=not math.isfinite(norm))
        try:
            self._densemixer_measured = metrics.measure()
        except UnmeasuredError as error:
            metrics.remove()
            self._densemixer_metrics, self._densemixer_measured = None, {}
            warn_unmeasured(error)
        return norm


def patch_megatron_engine(module: Any) -> None:
    """Measure where the engine steps. Its model has DenseMixer by its configuration."""

    @wrap(module.MegatronEngine, "optimizer_step")
    def optimizer_step(original: Any, self: Any) -> Any:
        norm = original(self)
        if wants_metrics(self.module):
            self._densemixer_measured = attached_to_megatron(self.module).metrics()
        return norm


def patch_training_worker(module: Any) -> None:
    """Report the measurements beside verl's own metrics of an update."""

    @wrap(module.TrainingWorker, "_postprocess_output")
    def _postprocess_output(original: Any, self: Any, output: Any, *, forward_only: bool, **kwargs: Any) -> Any:
        result = original(self, output, forward_only=forward_only, **kwargs)
        measured = getattr(self.engine, "_densemixer_measured", None)
        if measured and not forward_only:
            result.set_non_tensor("metrics", {**result["metrics"], **measured})
        return result


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


def _without_our_key(update: Any, module_config: Any, override_config_kwargs: Mapping[str, Any]) -> None:
    read_options(override_config_kwargs)  # a wrong option is an error in whatever process reads it first
    update(module_config, {key: value for key, value in override_config_kwargs.items() if key != KEY})


def _rebuild(config_class: Any, state: dict[str, Any]) -> Any:
    config = config_class.__new__(config_class)
    config.__dict__.update(state)
    return config


_boot.install()
_boot.patch_imported()
