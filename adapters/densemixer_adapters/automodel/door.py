"""The key ``densemixer`` under ``model:`` in Automodel's YAML, which is an argument of what builds the model.

Automodel hands every key of that section to its ``_target_``, ``NeMoAutoModelForCausalLM.from_pretrained`` and its
kin. A ``_target_`` of one's own would not do: Automodel gives its distributed settings and PEFT to its own ones alone.
So these learn one argument more: true, false, or a mapping with the fields of `densemixer_core.DenseMixerConfig`. It is
taken out before anybody else sees it, so configurations of models and checkpoints are as without.

`patch_auto_model` is called by the boot hook (`densemixer_adapters._boot`), right after its module was imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.automodel.attach import apply_densemixer, find_blocks
from densemixer_adapters.environment import is_on, left_alone
from densemixer_adapters.switch import read_switch, wrap
from densemixer_adapters.transformers.announce import warn

KEY = "densemixer"
SWITCH = f"model.{KEY}"


def patch_auto_model(module: Any) -> None:
    """Have Automodel's ``from_pretrained`` and ``from_config`` take our key, and attach to what they return."""
    for name in ("from_pretrained", "from_config"):
        wrap(module._BaseNeMoAutoModelClass, name)(_build_and_attach)


def _build_and_attach(build: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    for key in kwargs:
        if key != KEY and difflib.get_close_matches(key.lower(), [KEY, f"use_{KEY}"], cutoff=0.8):
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
