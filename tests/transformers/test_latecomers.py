"""Layers that come into a model after DenseMixer has been attached: they train without it, and that is said."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from densemixer_adapters.transformers import apply_densemixer, attached_handle, attached_layers
from densemixer_adapters.transformers.checks import EVERY
from densemixer_core import DenseMixerConfig

KINDS = ["qwen3_moe", "mixtral", "deepseek_v3"]


def layer_of(model: Any) -> Any:
    """A layer like the model's last, without DenseMixer."""
    last = model.model.layers[-1]
    return type(last)(model.config, layer_idx=len(model.model.layers) - 1)


def replace_block(model: Any) -> str:
    model.model.layers[1].mlp = layer_of(model).mlp
    return "model.layers.1.mlp"


def replace_layer(model: Any) -> str:
    model.model.layers[-1] = layer_of(model)
    return f"model.layers.{len(model.model.layers) - 1}.mlp"


def append_layer(model: Any) -> str:
    model.model.layers.append(layer_of(model))
    return f"model.layers.{len(model.model.layers) - 1}.mlp"


def insert_layer(model: Any) -> str:
    model.model.layers.insert(0, layer_of(model))
    return "model.layers.0.mlp"


def replace_all(model: Any) -> str:
    """No layer is left that could look."""
    blocks = FAMILIES[model.config.model_type].blocks(model)
    names = [name for name, module in model.named_modules() if any(module is block for block in blocks)]
    for name in names:
        model.set_submodule(name, layer_of(model).mlp)
    return names[0]


def replace_all_and_keep_them(model: Any) -> str:
    """None of them goes out of memory."""
    model.kept = FAMILIES[model.config.model_type].blocks(model)
    return replace_all(model)


def delete_all_first(model: Any) -> str:
    """Where they go, none has come yet."""
    model.model.layers = None
    model.model.layers = type(model)(model.config).model.layers
    return next(name for name, module in model.named_modules() if "experts" in dict(module.named_children()))


def step(model: Any) -> None:
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()


CHANGES = [
    replace_block,
    replace_layer,
    append_layer,
    insert_layer,
    replace_all,
    replace_all_and_keep_them,
    delete_all_first,
]


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_one_warning_names_the_first(
    change: Callable[[Any], str], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = FAMILIES[family].build("eager")
    handle = apply_densemixer(model)
    name = change(model)
    for _ in range(3):
        step(model)
    (record,) = (record for record in caplog.records if "has come into the model" in record.message)
    assert record.levelno == logging.WARNING
    assert f"{name} (" in record.message
    assert "apply_densemixer again" in record.message
    handle.remove()
    with apply_densemixer(model) as again:  # as the warning says
        assert len(again.layers) == len(FAMILIES[family].blocks(model))


@pytest.mark.parametrize("change", [replace_block, replace_all])
def test_in_a_copy_that_trains(change: Callable[[Any], str], caplog: pytest.LogCaptureFixture) -> None:
    model: Any = FAMILIES["qwen3_moe"].build("eager")
    with apply_densemixer(model):
        twin = copy.deepcopy(model)
        step(twin)
        name = change(twin)
    assert caplog.text.count(f"{name} (") == 1


def test_while_the_model_trains(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = FAMILIES["qwen3_moe"].build("eager")
    with apply_densemixer(model):
        step(model)
        append_layer(model)
        for _ in range(EVERY + 1):
            step(model)
    assert caplog.text.count("has come into the model") == 1


def test_at_once_where_it_takes_anothers_place(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = FAMILIES["qwen3_moe"].build("eager")
    with apply_densemixer(model):
        step(model)
        replace_block(model)
        assert "model.layers.1.mlp" in caplog.text


def test_nothing_is_said_of_a_model_that_goes(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = FAMILIES["qwen3_moe"].build("eager")
    handle = apply_densemixer(model)
    step(model)
    del model
    gc.collect()
    assert "has come into the model" not in caplog.text
    model = FAMILIES["qwen3_moe"].build("eager")
    handle = apply_densemixer(model)
    handle.remove()
    replace_all(model)
    assert "has come into the model" not in caplog.text


def wrap(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = checkpoint_wrapper(layer.mlp)
    model.model.layers[0] = torch.compile(model.model.layers[0])


def copy_a_layer(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))


def prune(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def exchange(model: Any) -> None:
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def hold_with_another(model: Any) -> None:
    nn.ModuleDict({"policy": model, "reference": FAMILIES["qwen3_moe"].build()})


def new_router(model: Any) -> None:
    block = model.model.layers[1].mlp
    block.gate = type(block.gate)(model.config)


@pytest.mark.parametrize("layers", [None, "-1:"])
@pytest.mark.parametrize("change", [wrap, copy_a_layer, prune, exchange, hold_with_another, new_router])
def test_nothing_is_said_of_others(
    change: Callable[[Any], None], layers: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """What stands in the model already, a copy that took DenseMixer along, other models, a router of a known kind."""
    if layers and change is copy_a_layer:
        layers = "1:"
    model = FAMILIES["qwen3_moe"].build("eager")
    with apply_densemixer(model, DenseMixerConfig(layers=layers)):
        change(model)
        step(model)
    assert "has come into the model" not in caplog.text


def test_a_copy_trains_as_before_and_can_be_changed() -> None:
    model: Any = FAMILIES["qwen3_moe"].build("eager")
    apply_densemixer(model)
    twin = copy.deepcopy(model)
    replace_block(twin)
    assert len(attached_layers(twin)) == 1
    step(twin)
    handle = attached_handle(twin)
    assert handle is not None
    handle.remove()
