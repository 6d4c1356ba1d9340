"""Attaching, detaching and what a user sees of it."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES
from runs import gradients
from torch import nn

from densemixer_adapters.cli.inspection import estimate
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig


def traces(model: nn.Module) -> dict[str, object]:
    """All attributes of all modules, hooks included."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            plain = isinstance(value, (int, float, str, bool, type(None)))
            found[f"{name}.{attribute}"] = value if plain else (type(value), repr(value))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_leaves_the_model_as_it_was(family: str) -> None:
    model = FAMILIES[family].build("eager")
    before, attributes, keys = gradients(model), traces(model), list(model.state_dict())
    model.zero_grad()
    handle = apply_densemixer(model)
    assert traces(model) != attributes
    assert list(model.state_dict()) == keys
    gradients(model)
    handle.remove()
    handle.remove()
    model.zero_grad()
    assert traces(model) == attributes
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_are_listed() -> None:
    model = FAMILIES["gpt_oss"].build()
    with apply_densemixer(model) as handle:
        assert [layer.name for layer in handle.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert handle.layers[0].router_name == "model.layers.0.mlp.router"
        assert handle.layers[0].router is model.model.layers[0].mlp.router
        assert handle.layers[0].experts is model.model.layers[0].mlp.experts


def test_attached_again_after_removal() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        first = gradients(model)
    with apply_densemixer(model):
        second = gradients(model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_single_block_will_do() -> None:
    block = FAMILIES["qwen3_moe"].build().model.layers[0].mlp
    with apply_densemixer(block) as handle:
        assert [layer.router_name for layer in handle.layers] == ["gate"]


def test_a_copy_of_the_model_trains_by_itself() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        copied = copy.deepcopy(model)
        original = gradients(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1.1)
        changed = gradients(copied)
        again = gradients(model)
    alone = gradients(copied)
    name = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(original[name], changed[name])
    assert torch.equal(original[name], again[name])
    assert torch.equal(changed[name], alone[name])  # what was removed is the original's
    with apply_densemixer(copied):  # takes the place of what the copy brought along
        assert torch.equal(changed[name], gradients(copied)[name])
    assert not torch.equal(changed[name], gradients(copied)[name])


def test_an_attached_model_can_be_pickled() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        loaded = pickle.loads(pickle.dumps(model))
        expected, found = gradients(model), gradients(loaded)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "text", "factor"),
    [
        ({}, "estimator densemixer", 1),
        ({"estimator": "centered", "layers": "-1:"}, "estimator centered, layers -1:", 1 / 2),
        ({"budget": 0.25, "seed": 3}, "estimator densemixer, budget 0.25, seed 3", 0.25 * 6 / 8),
        ({"estimator": "conventional"}, "estimator conventional", 0),
    ],
)
def test_attaching_is_logged_once(
    options: dict[str, Any], text: str, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    """With what `densemixer cost` says it costs."""
    caplog.set_level(logging.INFO, "densemixer")
    model: Any = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model, DenseMixerConfig(**options)) as handle:
        gradients(model)
    experts = model.model.layers[0].mlp.experts
    cost = factor * 2 * 2 * sum(p.numel() for p in experts.parameters())
    if options.get("budget", 1) < 1:  # g times the experts' means
        cost += 2 * 2 * experts.down_proj.shape[0] * experts.down_proj.shape[1]
    assert estimate(model, 128, DenseMixerConfig(**options)).extra == pytest.approx(cost)
    layers = f"{len(handle.layers)} layer{'s' * (len(handle.layers) > 1)}"
    assert caplog.messages == [
        f"DenseMixer is attached to {layers} of Qwen3MoeForCausalLM (qwen3_moe): {text}, "
        f"{cost / 1e9:.4g} GFLOP more a token in the backward"
    ]


def test_the_line_says_how_many_routers_are_frozen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "densemixer")
    model: Any = FAMILIES["qwen3_moe"].build()
    model.model.layers[0].mlp.gate.requires_grad_(False)
    apply_densemixer(model)
    cost = 2 * sum(p.numel() for p in model.model.layers[1].mlp.experts.parameters())
    assert caplog.messages[0] == (
        "DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM (qwen3_moe), of which 1 have a router that isn't "
        f"frozen: estimator densemixer, {cost / 1e9:.4g} GFLOP more a token in the backward"
    )
