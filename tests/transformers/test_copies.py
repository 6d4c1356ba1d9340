"""Copies of a model that DenseMixer is attached to: each trains by itself, and nothing of one lives in another."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import architectures
import oracle
import pytest
import torch
from families import FAMILIES, Family
from formulas import FORMULAS, dense
from oracle import assert_close
from runs import gradients, loss_of, selections
from sweep import step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from densemixer_adapters.environment import attach, read_settings
from densemixer_adapters.transformers import apply_densemixer, attached_layers
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]
NAMES = ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3"]


def changed(model: nn.Module, by: float = 1.1) -> nn.Module:
    """The model, whose weights aren't those of the one that it was copied from any longer."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(by)
    return model


def assert_exact(family: Family, model: nn.Module, estimator: str) -> None:
    """All gradients are the oracle's, of a model that DenseMixer knows nothing of, with these weights."""
    with selections(family, model) as indices:
        ours = gradients(model)
    plain = family.build("eager")
    plain.load_state_dict(model.state_dict())
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    assert_close(
        ours, gradients(family.oracle(plain, indices, estimator)), 3e-5
    )  # weights grow, and rounding with them


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_deepcopy_twice(model: nn.Module) -> nn.Module:
    return copy.deepcopy(copy.deepcopy(model))


def by_saving(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def by_averaging(model: nn.Module) -> nn.Module:
    """What keeps an exponential moving average of the weights, trained on for once."""
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.module


WAYS = [by_deepcopy, by_deepcopy_twice, by_saving, by_averaging]
Way = Callable[[nn.Module], nn.Module]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_is_copied_from_a_frozen_reference(name: str, estimator: str) -> None:
    family = FAMILIES[name]
    reference = family.build("eager")
    with apply_densemixer(reference, DenseMixerConfig(estimator)):
        gradients(reference)
        policy = changed(copy.deepcopy(reference))
        reference.zero_grad()
        reference.requires_grad_(False)
        with torch.no_grad():
            loss_of(reference)
        assert_exact(family, policy, estimator)
        with torch.no_grad():
            loss_of(reference)
        assert_exact(family, changed(policy), estimator)
        assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize("before", ["attached", "trained", "in the middle of a step"])
@pytest.mark.parametrize("way", WAYS)
def test_both_train_in_turn(way: Way, before: str) -> None:
    family = FAMILIES["qwen3_moe"]
    model = family.build("eager")
    with apply_densemixer(model, DenseMixerConfig("centered")):
        if before == "trained":
            gradients(model)
        elif before == "in the middle of a step":
            loss = loss_of(model)
        other = changed(way(model))
        if before == "in the middle of a step":
            loss.backward()
        for _ in range(2):
            assert_exact(family, model, "centered")
            assert_exact(family, other, "centered")
            changed(model, 0.9)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_layers_of_its_own(way: Way) -> None:
    model = FAMILIES["qwen3_moe"].build("eager")
    with apply_densemixer(model) as handle:
        other = way(model)
        layers = attached_layers(other)
        assert attached_layers(model) == handle.layers
        assert [layer.name for layer in layers] == [layer.name for layer in handle.layers]
        own = set(other.modules())
        for layer in layers:
            assert {layer.block, layer.router, layer.experts} <= own
            assert layer not in handle.layers


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_original_lives_on(way: Way) -> None:
    family = FAMILIES["qwen3_moe"]
    model = family.build("eager")
    handle = apply_densemixer(model)
    gradients(model)
    other = changed(way(model))
    references = [weakref.ref(x) for x in [*model.modules(), *model.parameters(), *handle.layers, handle]]
    del model, handle
    gc.collect()
    assert not [reference() for reference in references if reference() is not None]
    assert_exact(family, other, "densemixer")
    gc.collect()


@pytest.mark.parametrize("way", WAYS)
def test_removing_the_original_leaves_the_copy_alone(way: Way) -> None:
    family = FAMILIES["qwen3_moe"]
    model = family.build("eager")
    conventional = gradients(model)
    handle = apply_densemixer(model)
    other = changed(way(model))
    handle.remove()
    assert attached_layers(model) == []
    after = gradients(model)
    assert all(torch.equal(after[name], conventional[name]) for name in conventional)
    assert_exact(family, other, "densemixer")
    with apply_densemixer(model, DenseMixerConfig("centered")):
        assert_exact(family, model, "centered")
        assert_exact(family, other, "densemixer")


@pytest.mark.parametrize("way", WAYS)
def test_attaching_to_a_copy_takes_the_place_of_what_it_came_with(way: Way) -> None:
    """Nobody holds a handle to the layers that a copy brought along."""
    family = FAMILIES["qwen3_moe"]
    model = family.build("eager")
    with apply_densemixer(model) as handle:
        other = changed(way(model))
        conventional = gradients(family.oracle(plain_copy(family, other), routing(family, other), "conventional"))
        own = apply_densemixer(other, DenseMixerConfig("centered"))
        assert attached_layers(other) == own.layers
        assert_exact(family, other, "centered")
        assert_exact(family, model, "densemixer")
        own.remove()
        assert attached_layers(other) == []
        assert attached_layers(model) == handle.layers
        assert_close(gradients(other), conventional)
        assert_exact(family, model, "densemixer")
        with pytest.raises(RuntimeError, match="attached already"):  # its handle is held
            apply_densemixer(model)


def plain_copy(family: Family, model: nn.Module) -> nn.Module:
    plain = family.build("eager")
    plain.load_state_dict(model.state_dict())
    return plain


def routing(family: Family, model: nn.Module) -> list[Tensor]:
    with selections(family, model) as indices, torch.no_grad():
        loss_of(model)
    return indices


def test_a_copy_whose_handle_is_held_is_attached_already() -> None:
    model = FAMILIES["qwen3_moe"].build("eager")
    with apply_densemixer(model):
        other = copy.deepcopy(model)
        with apply_densemixer(other), pytest.raises(RuntimeError, match="attached already"):
            apply_densemixer(other)


@pytest.mark.parametrize("way", WAYS)
def test_the_environment_attaches_to_originals_and_to_copies(way: Way) -> None:
    """What loading a model under DENSEMIXER_ENABLED=1 does, then attaching again, to the copy alone."""
    family = FAMILIES["qwen3_moe"]
    settings = read_settings({"DENSEMIXER_ENABLED": "1"})
    model = family.build("eager")
    attach(model, settings)
    other = changed(way(model))
    assert_exact(family, other, "densemixer")
    attach(other, settings)
    assert_exact(family, other, "densemixer")
    assert_exact(family, model, "densemixer")
    with apply_densemixer(other, DenseMixerConfig("centered")):
        assert_exact(family, other, "centered")
        assert_exact(family, model, "densemixer")
    assert attached_layers(other) == []
    assert_exact(family, model, "densemixer")
    with apply_densemixer(model, DenseMixerConfig("centered")):  # which gives way as ever
        assert_exact(family, model, "centered")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_scale_of_each_expert_is_the_copys_own(estimator: str) -> None:
    """Gemma 4."""
    with oracle.Float64():
        model: Any = architectures.build("gemma4").double()
        plain = copy.deepcopy(model)
        with apply_densemixer(model, DenseMixerConfig(estimator)) as handle:
            step(model)
            other = copy.deepcopy(model)
            names = [layer.router_name for layer in handle.layers]
            for changing in (other, plain):
                for name in names:
                    changing.get_submodule(name).per_expert_scale.data.mul_(torch.linspace(0.5, 3, 8).double())
            _, ours = step(other)
        pairs = [(plain.get_submodule(layer.name), plain.get_submodule(layer.router_name)) for layer in handle.layers]
        _, truth = step(dense(plain, pairs, FORMULAS["gemma4"], estimator))
    assert_close(ours, truth, 1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_copied_inside_the_model(name: str, estimator: str) -> None:
    """Layer expansion. The model's handle removes from its copied layers as well."""
    family = FAMILIES[name]

    def expand(model: Any) -> Any:
        layers = model.model.layers
        layers.extend([copy.deepcopy(layers[0]), copy.deepcopy(layers[1])])
        for position, layer in enumerate(layers):
            layer.self_attn.layer_idx = position
            changed(layer, 1 - 0.02 * position)
        model.config.num_hidden_layers = len(layers)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [*model.config.layer_types[:2], *model.config.layer_types[:2]]
        return model

    model = family.build("eager")
    handle = apply_densemixer(model, DenseMixerConfig(estimator))
    expand(model)
    assert len(attached_layers(model)) == 4
    plain = expand(family.build("eager"))
    with selections(family, model) as indices:
        ours = gradients(model)
    assert len(indices) == 4
    assert_close(ours, gradients(family.oracle(plain, indices, estimator)))
    handle.remove()
    assert attached_layers(model) == []
    conventional, after = gradients(plain), gradients(model)
    assert all(torch.equal(after[key], value) for key, value in conventional.items())
    with apply_densemixer(model, DenseMixerConfig(estimator)) as handle:
        assert len(handle.layers) == 4
        assert_close(gradients(model), ours)


def test_averaging_beside_the_training() -> None:
    """A moving average is updated after each step, evaluated without gradients, and never trained."""
    family = FAMILIES["deepseek_v3"]
    model = family.build("eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = apply_densemixer(model)
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        assert_exact(family, model, "densemixer")
        optimizer.step()
        averaged.update_parameters(model)
        with torch.no_grad():
            loss_of(averaged.module)
    handle.remove()
    assert len(attached_layers(averaged)) == 2
    assert_exact(family, averaged.module, "densemixer")


@pytest.mark.parametrize("said_of_the_original", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_frozen_routers_of_a_copy_are_warned_of_once(
    way: Way, said_of_the_original: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is another model, maybe in another process, and learns its blocks in its first forward."""
    family = FAMILIES["qwen3_moe"]
    model = family.build("eager")
    with apply_densemixer(model):
        for block in family.blocks(model):
            block.gate.requires_grad_(not said_of_the_original)
        gradients(model)
        other = way(model)
        for block in family.blocks(other):
            block.gate.requires_grad_(False)
        caplog.clear()
        for _ in range(3):
            gradients(other)
    (record,) = caplog.records
    assert "nothing to train in 2 of 2 layers" in record.getMessage()
    assert "(model.layers.0.mlp.gate and 1 more)" in record.getMessage()
