"""The key ``densemixer`` under ``model:`` in Automodel's YAML, which is an argument of what builds the model.

Automodel hands every key of that section to its ``_target_``, ``NeMoAutoModelForCausalLM.from_pretrained`` and its
kin. A ``_target_`` of one's own would not do: Automodel gives its distributed settings and PEFT to its own ones alone.
So these learn one argument more: true, false, or a mapping with the fields of `densemixer_core.DenseMixerConfig`. It is
taken out before anybody else sees it, so configurations of models and checkpoints are as without.

`patch_auto_model` and `patch_arg_parser` are called by the boot hook (`densemixer_adapters._boot`), each right after
its module was imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.automodel.attach import apply_densemixer, find_blocks
from densemixer_adapters.environment import is_on, left_alone
from densemixer_adapters.switch import looks_like, read_switch, wrap
from densemixer_adapters.transformers.announce import warn

KEY = "densemixer"
SWITCH = f"model.{KEY}"


def patch_auto_model(module: Any) -> None:
    """Have Automodel's ``from_pretrained`` and ``from_config`` take our key, and attach to what they return."""
    for name in ("from_pretrained", "from_config"):
        wrap(module._BaseNeMoAutoModelClass, name)(_build_and_attach)


def patch_arg_parser(module: Any) -> None:
    """Refuse our key where nobody would read it, before anything is loaded: Automodel ignores what it doesn't know."""

    @wrap(module, "parse_args_and_load_config")
    def parse_args_and_load_config(original: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        for path in _misplaced(config.to_dict()):
            raise ValueError(f"{path}: nobody reads it there. DenseMixer's key is {SWITCH}.")
        return config


def _misplaced(section: Any, path: str = "") -> Iterator[str]:
    """The paths of what looks like our key in a section that is no argument of anything."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        if not looks_like(key, KEY):
            yield from _misplaced(value, f"{path}{key}.")
        elif "_target_" not in section:
            yield f"{path}{key}"


def _build_and_attach(build: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    for key in kwargs:
        if key != KEY and looks_like(key, KEY):
            raise ValueError(f"model.{key}: no such key; did you mean {SWITCH}?")
    value = kwargs.pop(KEY, None)
    if not isinstance(value, Mapping) and hasattr(value, "to_dict"):  # a section of Automodel's YAML
        value = value.to_dict()
    options = read_switch(SWITCH, value)  # a wrong value is an error before minutes of loading
    with left_alone(value is not None):
        model = build(cls, *args, **kwargs)
    if options is not None:
        try:
            apply_densemixer(model, options)
        except ValueError as error:
            raise type(error)(f"{SWITCH}: {error}") from None
    elif value is None and is_on(os.environ, ENABLED, False) and _has_own_layers(model):
        warn(
            f"{ENABLED}=1 reaches models of transformers, and {type(model).__name__} has layers of Automodel's own: it "
            f"trains without DenseMixer. Set {SWITCH}: true instead."
        )
    return model


def _has_own_layers(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(find_blocks(model))
