"""Routers and experts inside the wrappers of torch that recompute them, from the start or since attaching."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from blocks import KINDS
from families import FAMILIES, Family
from lora import router_gradients, truth_of, wrapped
from oracle import Float64, assert_close
from runs import gradients, selections
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from densemixer_adapters.transformers import apply_densemixer, attached_layers
from densemixer_core import DenseMixerConfig, sampled

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "reentrant": partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
    "non-reentrant": partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
}
PLACES = ["experts", "router", "router and experts", "block", "all three"]


def wrap(family: Family, model: nn.Module, place: str, wrapper: Callable[[nn.Module], nn.Module]) -> None:
    """Put each layer's parts into wrappers, by the function of torch that does so."""
    parts: dict[nn.Module, str] = {}
    for block in family.blocks(model):
        parts |= {block: "block", block.experts: "experts", getattr(block, family.router): "router"}
    chosen = {part for part, name in parts.items() if name in place or place == "all three"}
    apply_activation_checkpointing(model, wrapper, check_fn=lambda module: module in chosen)
    assert sum(isinstance(module, CheckpointWrapper) for module in model.modules()) == len(chosen)


def plainly_named(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}


def truth(family: Family, model: nn.Module, estimator: str) -> dict[str, Tensor]:
    """Of a model that nothing is attached to and nothing wrapped."""
    with selections(family, model) as indices:
        gradients(model)
    with Float64():
        return gradients(truth_of(family, model, indices, estimator))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("family", "estimator", "place"),
    [
        *(("qwen3_moe", "densemixer", place) for place in PLACES),
        *((family, "centered", place) for family in ("gpt_oss", "deepseek_v3") for place in ("experts", "router")),
    ],
)
def test_gradients(family: str, estimator: str, place: str, wrapper: str, when: str) -> None:
    of, config = FAMILIES[family], DenseMixerConfig(estimator)
    model = of.build()
    expected = truth(of, model, estimator)
    if when == "before":
        wrap(of, model, place, WRAPPERS[wrapper])
    with apply_densemixer(model, config) as handle:
        if when == "after":
            wrap(of, model, place, WRAPPERS[wrapper])
        assert attached_layers(model) == handle.layers
        for _ in range(2):
            assert_close(plainly_named(gradients(model)), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", KINDS)
def test_wrapped_anew_between_steps(family: str) -> None:
    of = FAMILIES[family]
    model = of.build("eager")
    expected = truth(of, model, "centered")
    with apply_densemixer(model, DenseMixerConfig("centered")):
        assert_close(gradients(model), expected)
        wrap(of, model, "experts", WRAPPERS["reentrant"])
        with torch.no_grad():
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
        assert_close(plainly_named(gradients(model)), expected)
        for block in of.blocks(model):
            block.experts = WRAPPERS["non-reentrant"](block.experts._checkpoint_wrapped_module)
            setattr(block, of.router, WRAPPERS["reentrant"](getattr(block, of.router)))
        assert_close(plainly_named(gradients(model)), expected)


@pytest.mark.parametrize(("when", "estimator"), [("before", "densemixer"), ("after", "centered")])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", ["experts", "router", "router inside of PEFT's wrapper", "block"])
def test_with_adapters_on_experts(place: str, wrapper: str, when: str, estimator: str) -> None:
    of = FAMILIES["qwen3_moe"]
    model = wrapped(of, of.build(), "experts", "modules_to_save")
    expected = truth(of, model, estimator)

    def wrap_it() -> None:
        if "PEFT" in place:
            routers = {module for module in model.modules() if type(module).__name__ == "Qwen3MoeTopKRouter"}
            apply_activation_checkpointing(model, WRAPPERS[wrapper], check_fn=lambda module: module in routers)
        else:
            wrap(of, model, place, WRAPPERS[wrapper])

    if when == "before":
        wrap_it()
    with apply_densemixer(model, DenseMixerConfig(estimator)):
        if when == "after":
            wrap_it()
        ours = plainly_named(gradients(model))
    assert_close(ours, expected)
    assert len(router_gradients(of, ours)) == 2


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
def test_the_extra_pass_runs_once_a_layer(place: str, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, evaluate = [], sampled.expert_dots
    monkeypatch.setattr(sampled, "expert_dots", lambda *args: passes.append(1) or evaluate(*args))
    of = FAMILIES["qwen3_moe"]
    model = of.build()
    with apply_densemixer(model) as handle:
        wrap(of, model, place, WRAPPERS[wrapper])
        gradients(model)
    assert len(passes) == len(handle.layers) == 2


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
def test_the_outputs_stay_those_of_the_host(place: str, wrapper: str) -> None:
    of = FAMILIES["gpt_oss"]
    model = of.build()
    ids = torch.arange(3, 15).reshape(2, 6)
    plain = model(input_ids=ids).logits
    with apply_densemixer(model):
        wrap(of, model, place, WRAPPERS[wrapper])
        assert torch.equal(model(input_ids=ids).logits, plain)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
def test_removed_and_attached_again_inside_of_wrappers(place: str, wrapper: str) -> None:
    of = FAMILIES["qwen3_moe"]
    model = of.build("eager")
    conventional, expected = gradients(model), truth(of, model, "densemixer")
    handle = apply_densemixer(model)
    wrap(of, model, place, WRAPPERS[wrapper])
    assert_close(plainly_named(gradients(model)), expected)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert_close(plainly_named(gradients(model)), conventional, 0)
    with apply_densemixer(model):
        assert_close(plainly_named(gradients(model)), expected)
