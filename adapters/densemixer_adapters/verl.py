"""DenseMixer in verl: ``+actor_rollout_ref.model.override_config.densemixer=true`` on the command line.

``+critic.model.…`` does the same for the critic and ``+model.…`` for the SFT trainers. Instead of ``true``, a mapping
with the fields of `densemixer_core.DenseMixerConfig` gives options; ``false`` says no to ``DENSEMIXER_ENABLED=1`` too.
The engines ``fsdp``, ``fsdp2`` and ``veomni`` are served by `densemixer_adapters.verl_engines`, ``automodel`` by
`densemixer_adapters.automodel`. The engine ``megatron`` has the field of `densemixer_adapters.megatron` in
``…megatron.override_transformer_config``.

With the option ``metrics`` each update's metrics have the router metrics, by layer too, for one forward more of a
micro-batch, without gradients. The engine ``megatron`` has those that need no further forward.

verl trains in Ray workers, so a patch made in the process that starts them doesn't reach them. The functions
``patch_…`` are called by the boot hook (`densemixer_adapters._boot`), in every process, each right after its module of
verl was imported. Importing this module puts that hook in place where it isn't yet. verl does so by itself (entry point
``verl.plugins``); ``…model.external_lib=densemixer_adapters.verl`` serves where this package can be imported but is not
installed. Once is enough: whoever comes second finds the hook in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from densemixer_adapters import _boot
from densemixer_adapters.megatron import FLAG as MEGATRON_FLAG
from densemixer_adapters.megatron import attached_handle as attached_megatron_handle
from densemixer_adapters.megatron import wants_metrics
from densemixer_adapters.switch import looks_like, read_switch, wrap
from densemixer_core import DenseMixerConfig

KEY = "densemixer"
SWITCH = f"override_config.{KEY}"
ENGINES = ("automodel", "fsdp", "fsdp2", "veomni")


def read_options(override_config: Mapping[str, Any]) -> DenseMixerConfig | None:
    """The options in a model's ``override_config``, or in ``model_config`` therein; None where DenseMixer is off.

    Raises:
        ValueError: Our key's value or an option is wrong, or a key looks like a misspelling of ours.
    """
    for key in (key for place in _places(override_config) for key in place):
        if key != KEY and looks_like(key, KEY):
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
        if looks_like(key, KEY) and "override_config" not in path[-2:]:
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
        for key in (key for key in kwargs if looks_like(key, KEY)):
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
        wanted = model is not None and engine is not None and not engine.forward_only and options_of(model)
        if wanted and backend not in ENGINES:
            if backend == "megatron":
                raise ValueError(
                    f"{SWITCH}: verl's engine 'megatron' has a switch of its own, a field of Megatron Core's "
                    f"configuration. Replace this one by +…megatron.override_transformer_config.{MEGATRON_FLAG}=true."
                )
            if backend == "torchtitan":
                raise ValueError(
                    f"{SWITCH}: verl's engine 'torchtitan' is written for nightly builds of torchtitan and torch, and "
                    "doesn't import with releases of torchtitan, so DenseMixer can't be tested with it. Set "
                    f"strategy=fsdp2 for this role, or drop {SWITCH}; torchtitan's own trainer has DenseMixer."
                )
            raise ValueError(
                f"{SWITCH}: verl's engine {backend!r} is not supported, only {', '.join(ENGINES)} and megatron. "
                f"Either set strategy=fsdp2 for this role, or drop {SWITCH}."
            )
        return original(cls, model_type, backend, *args, **kwargs)


def patch_megatron_engine(module: Any) -> None:
    """Measure where the engine steps. Its model has DenseMixer by its configuration."""

    @wrap(module.MegatronEngine, "optimizer_step")
    def optimizer_step(original: Any, self: Any) -> Any:
        norm = original(self)
        if wants_metrics(self.module):
            self._densemixer_measured = attached_megatron_handle(self.module).metrics()
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


def options_of(model_config: Any) -> DenseMixerConfig | None:
    """The options in verl's configuration of a model; None where DenseMixer is off."""
    return read_options(_override_config(model_config))


def says_anything(model_config: Any) -> bool:
    """Whether our key is set there, be it to ``false``."""
    return _value(_override_config(model_config)) is not None


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
