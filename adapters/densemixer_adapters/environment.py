"""DenseMixer without a line of code: ``DENSEMIXER_ENABLED=1`` in the environment of any program.

Every model that transformers loads (``from_pretrained``, ``from_config``) gets DenseMixer if it is a
Mixture-of-Experts. `patch_modeling_utils` is called by the boot hook (`densemixer_adapters._boot`), in every process
that imports transformers, so the children of torchrun and Ray's workers are reached too. A layer that doesn't train, as
in a reference model, costs nothing. A framework's own switch takes precedence: with its options where it asks for
DenseMixer, and where it says no.

========================  ==========================================================================================
``DENSEMIXER_ENABLED``    ``1`` switches it on
``DENSEMIXER_MODELS``     the model types to attach to, e.g. ``qwen3_moe,olmoe``; all if unset
``DENSEMIXER_QWEN3``      ``0`` leaves out Qwen3-MoE; ``DENSEMIXER_QWEN2`` and ``DENSEMIXER_OLMOE`` likewise (they are
                          the original's)
``DENSEMIXER_ESTIMATOR``  and so on: a field of `densemixer_core.DenseMixerConfig` each
``DENSEMIXER_LOG_LEVEL``  the level of the logger ``densemixer``, ``info`` if unset: a line for each model, on rank 0.
                          Where the program's logging doesn't show it, it is on standard error
========================  ==========================================================================================

Where it is on, any other name that begins with ``DENSEMIXER_`` is an error: it would be a misspelt one.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.deepspeed import mark_leaf_modules
from densemixer_adapters.switch import wrap
from densemixer_adapters.transformers import UnsupportedModelError, has_experts
from densemixer_adapters.transformers import attach as attach_densemixer
from densemixer_adapters.transformers.announce import announce, describe, show_log
from densemixer_core import DenseMixerConfig
from densemixer_core.config import ENVIRONMENT_PREFIX, did_you_mean, read_flag

MODELS = "DENSEMIXER_MODELS"
LOG_LEVEL = "DENSEMIXER_LOG_LEVEL"
MODEL_SWITCHES = {
    "DENSEMIXER_QWEN3": "qwen3_moe",
    "DENSEMIXER_QWEN2": "qwen2_moe",
    "DENSEMIXER_OLMOE": "olmoe",
}
"""The original's variables, which are on unless they are set to off, and the model types that they speak of."""

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_loading = contextvars.ContextVar("densemixer_loading", default=False)
"""Whether models are loaded that are none of our business."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment says.

    Args:
        enabled: Whether to attach at all.
        only: The model types to attach to, None for all.
        never: Model types to leave alone.
        config: The options.
        log_level: The level of the logger ``densemixer``, None for ``info`` unless the program has set one.
    """

    enabled: bool
    only: frozenset[str] | None
    never: frozenset[str]
    config: DenseMixerConfig
    log_level: str | None

    def wants(self, model_type: str) -> bool:
        return self.enabled and model_type not in self.never and (self.only is None or model_type in self.only)


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read all variables; where DenseMixer is off, no other one counts.

    Raises:
        ValueError: A variable's value is wrong, or its name. The message names the variable.
    """
    environ = os.environ if environ is None else environ
    if not is_on(environ, ENABLED, False):
        return Settings(False, None, frozenset(), DenseMixerConfig(), None)
    config = DenseMixerConfig.from_environment(environ)
    named = {name.strip() for name in environ.get(MODELS, "").split(",")} - {""}
    known = known_model_types()
    if unknown := sorted(named - known):
        hints = "".join(did_you_mean(name, known) for name in unknown)
        raise ValueError(f"environment variable {MODELS}: {', '.join(unknown)}: no such model type{hints}")
    level = environ.get(LOG_LEVEL, "").upper() or None
    if level not in (None, *LEVELS):
        raise ValueError(f"environment variable {LOG_LEVEL}={environ[LOG_LEVEL]!r}: must be one of {', '.join(LEVELS)}")
    return Settings(
        enabled=True,
        only=frozenset(named) if named else None,
        never=frozenset(kind for name, kind in MODEL_SWITCHES.items() if not is_on(environ, name, True)),
        config=config,
        log_level=level,
    )


def is_on(environ: Mapping[str, str], name: str, default: bool) -> bool:
    """Whether a variable is on; an empty one is off.

    Raises:
        ValueError: It is no word for on or off. The message names the variable.
    """
    text = environ.get(name)
    if text is None:
        return default
    try:
        return bool(text.strip()) and read_flag(text)
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r}: {error}") from None


def known_model_types() -> set[str]:
    """Those that transformers knows, and those that the running program has registered."""
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING)


def patch_modeling_utils(module: Any) -> None:
    """Attach to each model that ``PreTrainedModel`` loads, as the last step of its loading."""
    for name in ("from_pretrained", "_from_config"):
        wrap(module.PreTrainedModel, name)(_load_and_attach)


def _load_and_attach(load: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    if _loading.get():
        return load(cls, *args, **kwargs)
    settings = read_settings()  # a wrong value is an error before minutes of loading
    if settings.enabled:
        show_log(settings.log_level)
    with left_alone():  # a part of the model may be loaded by itself
        result = load(cls, *args, **kwargs)
    attach(result[0] if isinstance(result, tuple) else result, settings)
    return result


@contextlib.contextmanager
def left_alone(wanted: bool = True) -> Iterator[None]:
    """Models that are loaded herein are not attached to: a framework's own switch says what becomes of them.

    Args:
        wanted: Whether that switch is set at all; else the environment's counts.
    """
    token = _loading.set(wanted or _loading.get())
    try:
        yield
    finally:
        _loading.reset(token)


def attach(model: nn.Module, settings: Settings) -> None:
    """Attach DenseMixer if the settings want it for this model and it has experts; say so either way.

    Raises:
        UnsupportedModelError: It has experts that DenseMixer can't train. The message says how to leave it out.
        ValueError: The options select layers that the model doesn't have.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if not settings.wants(model_type):
        if settings.enabled and has_experts(model):
            announce(
                f"{ENABLED}=1: {type(model).__name__} ({model_type}) is left out, as {MODELS} or the variable of its "
                "family says"
            )
        return
    if not has_experts(model):
        announce(f"{ENABLED}=1: {type(model).__name__} has no Mixture-of-Experts layers, so nothing is attached")
        return
    try:
        handle = attach_densemixer(model, settings.config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{ENABLED}=1: {error} To train other model types only, name them in {MODELS}."
        ) from None
    except ValueError as error:
        raise ValueError(f"environment variable {ENVIRONMENT_PREFIX}LAYERS: {error}") from None
    announce(describe(model, handle.layers))
    handle.frozen_routers.warn()
    handle.gives_way = True
    if is_deepspeed_zero3_enabled():
        mark_leaf_modules(handle)
