"""PEFT: adapters on attention and on the stacked experts, a router that trains in full or through an adapter."""

from __future__ import annotations

import copy
import filecmp
import itertools
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from families import FAMILIES, IMPLEMENTATIONS, Family
from living import living_bytes
from lora import VARIANTS, lora_config, one_adapter_only, router_gradients, truth_of, wrapped
from oracle import assert_close
from runs import Operations, gradients, loss_of, selections
from torch import Tensor, nn

from densemixer_adapters.transformers import DenseMixerHandle, apply_densemixer
from densemixer_core import DenseMixerConfig

ROUTERS = ["modules_to_save", "target_parameters"]
WHENS = ["before", "after"]
PLACES = ["attention", "experts"]
# DoRA and `target_parameters`: see test_peft_has_no_dora_for_parameters.
COMBINATIONS = [
    pytest.param(variant, on, router, id=f"{variant}-{on}-{router}")
    for variant, on, router in itertools.product(VARIANTS, PLACES, ROUTERS)
    if variant != "dora" or (on, router) == ("attention", "modules_to_save")
]


def attached(
    family: Family, when: str, *how: str, implementation: str = "grouped_mm", estimator: str = "densemixer"
) -> tuple[Any, DenseMixerHandle]:
    """A PEFT model, wrapped as `lora.lora_config` says, that DenseMixer was attached to ``when``."""
    model, config = family.build(implementation), DenseMixerConfig(estimator)
    handle = apply_densemixer(model, config) if when == "before" else None
    peft_model = wrapped(family, model, *how)
    return peft_model, handle or apply_densemixer(peft_model, config)


def ours_and_truth(family: Family, model: nn.Module, estimator: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with selections(family, model) as indices:
        ours = gradients(model)
    with oracle.Float64():
        truth = gradients(truth_of(family, model, indices, estimator))
    return ours, truth


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize(("variant", "on", "router"), COMBINATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients(family: str, variant: str, on: str, router: str, when: str) -> None:
    """All that trains: the router or its adapter, and the adapters of attention or experts."""
    of = FAMILIES[family]
    model, handle = attached(of, when, on, router, variant)
    with handle:
        ours, truth = ours_and_truth(of, model, "densemixer")
    assert_close(ours, truth)
    conventional = router_gradients(of, gradients(model))
    for name, found in router_gradients(of, ours).items():
        assert oracle.relative_error(found, conventional[name]) > 0.05, name


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("estimator", ["conventional", "densemixer", "centered"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapters_on_experts(implementation: str, estimator: str, when: str) -> None:
    of = FAMILIES["qwen2_moe-renormalised"]
    model, handle = attached(of, when, "experts", "modules_to_save", implementation=implementation, estimator=estimator)
    with handle:
        assert_close(*ours_and_truth(of, model, estimator))


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("router", ROUTERS)
def test_experts_in_full(router: str, when: str) -> None:
    """`modules_to_save` makes a copy of the experts, too."""
    of = FAMILIES["qwen3_moe"]
    model, handle = attached(of, when, "experts in full", router)
    with handle:
        assert_close(*ours_and_truth(of, model, "densemixer"))


@pytest.mark.parametrize("on", PLACES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_router_as_in_the_merged_model(family: str, on: str) -> None:
    of = FAMILIES[family]
    model, handle = attached(of, "before", on, "modules_to_save")
    with handle, selections(of, model) as indices:
        ours = gradients(model)
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    with oracle.Float64():
        truth = gradients(of.oracle(merged, indices, "densemixer"))
    found = router_gradients(of, ours)
    assert len(found) == (4 if family == "gpt_oss" else 2)
    for name, gradient in found.items():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert oracle.worst_error(gradient, truth[plain]) <= 1e-5, name


@pytest.mark.parametrize(("on", "router"), [("experts", "modules_to_save"), ("attention", "target_parameters")])
def test_peft_has_no_dora_for_parameters(on: str, router: str) -> None:
    of = FAMILIES["qwen3_moe"]
    with pytest.raises(ValueError, match=r"ParamWrapper does not work with use_dora=True"):
        wrapped(of, of.build(), on, router, "dora")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapters_of_experts_train_bitwise_as_before(implementation: str, router: str) -> None:
    """For the same gradient of a layer's output, only the router's own gradient and the input's change."""
    of = FAMILIES["qwen3_moe"]
    model = wrapped(of, of.build(implementation), "experts", router)
    block = of.blocks(model)[0]
    x, g = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(0))

    def run() -> dict[str, Tensor]:
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        block(inputs).backward(g)
        return {"input": inputs.grad, **{n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}}

    before = run()
    with apply_densemixer(model):
        after = run()
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different == {name for name in before if name == "input" or name.startswith("gate.")}
    assert sum("lora_" in name and name.startswith("experts.") for name in before) == 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradient_checkpointing(router: str, reentrant: bool) -> None:
    of = FAMILIES["qwen3_moe"]
    model = wrapped(of, of.build(), "experts", router)
    with apply_densemixer(model):
        expected = gradients(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_close(gradients(model), expected)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("on", [*PLACES, "experts in full"])
def test_merge_and_unload(on: str, router: str, when: str) -> None:
    """Training goes on in the plain model, and nothing is left behind."""
    of = FAMILIES["qwen3_moe"]
    model, handle = attached(of, when, on, router)
    model = model.merge_and_unload().requires_grad_(True)
    assert isinstance(model, type(of.build()))
    ours = gradients(model)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())
    with apply_densemixer(model):
        expected = gradients(model)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_merged_and_unmerged_in_place(router: str) -> None:
    of = FAMILIES["qwen3_moe"]
    model = wrapped(of, of.build(), "experts", router)
    with apply_densemixer(model):
        expected = gradients(model)
        model.merge_adapter()
        model.unmerge_adapter()
        assert_close(gradients(model), expected)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("on", PLACES)
def test_disabled_adapters(on: str, router: str, when: str) -> None:
    """Nothing trains, so the run is the conventional one, operation by operation; and then adapters are on again."""
    of = FAMILIES["qwen3_moe"]
    model, handle = attached(of, when, on, router)

    def disabled() -> list[str]:
        with model.disable_adapter(), Operations() as operations:
            model.requires_grad_(False)  # PEFT 0.18 lets the original router train now
            assert gradients(model).keys() == {"input"}
        return operations.names

    with handle:
        expected = gradients(model)
        ours = disabled()
        assert_close(gradients(model), expected)
    assert ours == disabled()


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_router_beneath_disabled_adapters(router: str, when: str) -> None:
    """Where the host's own router trains while the adapters are off, it is the one that learns."""
    of = FAMILIES["qwen3_moe"]
    model, handle = attached(of, when, "experts", router)
    with handle, model.disable_adapter():
        for layer in handle.layers:
            inner = getattr(layer.router, "original_module", None) or layer.router.base_layer
            inner.requires_grad_(True)
        ours, truth = ours_and_truth(of, model, "densemixer")
    assert_close(ours, truth)
    assert len(router_gradients(of, ours)) == 2


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("on", PLACES)
def test_two_adapters(on: str, router: str, when: str) -> None:
    of = FAMILIES["qwen3_moe"]
    model, handle = attached(of, when, on, router)
    with handle:
        if "target_parameters" in (router, {"experts": "target_parameters"}.get(on)) and one_adapter_only():
            with pytest.raises(ValueError, match="one LoRA adapter per model with `target_parameters`"):
                model.add_adapter("other", lora_config(of, on, router))
            return
        model.add_adapter("other", lora_config(of, on, router))
        for active in ("other", "default"):
            model.set_adapter(active)
            ours, truth = ours_and_truth(of, model, "densemixer")
            assert_close(ours, truth)
            assert all(f".{active}" in name for name in ours if name != "input")
        if (on, router) == ("experts", "target_parameters"):
            model.base_model.set_adapter(["default", "other"])
            ours, truth = ours_and_truth(of, model, "densemixer")
            assert_close(ours, truth)
            assert {name for name in ours if ".other" in name}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("on", [*PLACES, "experts in full"])
def test_remove_leaves_no_trace(on: str, router: str, when: str) -> None:
    of = FAMILIES["qwen3_moe"]
    model, handle = attached(of, when, on, router)
    ours = gradients(model)
    handle.remove()
    hooks = [module._forward_hooks or module._forward_hooks_with_kwargs for module in model.modules()]
    assert not any(hooks)
    expected = gradients(wrapped(of, of.build(), on, router))
    found = gradients(model)
    assert found.keys() == expected.keys() == ours.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("router", ROUTERS)
def test_checkpoints_are_those_of_peft(router: str, when: str, tmp_path: Path) -> None:
    of = FAMILIES["qwen3_moe"]
    model, handle = attached(of, when, "experts", router)
    with handle:
        gradients(model)
        model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "without").iterdir())
    assert "adapter_model.safetensors" in names
    assert sorted(path.name for path in (tmp_path / "with").iterdir()) == names
    assert filecmp.cmpfiles(tmp_path / "with", tmp_path / "without", names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_copy_of_adapted_experts_is_kept(implementation: str) -> None:
    """Of what the forward creates, as little more lives until the backward as without adapters on the experts."""
    of = FAMILIES["qwen3_moe"]
    model = wrapped(of, of.build(implementation), "experts", "modules_to_save")
    conventional = living_bytes(lambda: loss_of(model))
    with apply_densemixer(model) as handle:
        extra = living_bytes(lambda: loss_of(model)) - conventional
        stacked = sum(p.nbytes for p in handle.layers[0].experts.parameters(recurse=False))
    tokens, experts, k, layers = 24, 8, 2, len(handle.layers)
    routing = layers * tokens * (experts + 1 + k) * 4
    if one_adapter_only():
        # There LoRA's product B·A lives instead of the factors alone, so it is the price of keeping no W + B·A.
        assert 0 <= extra <= layers * stacked + routing
    else:
        assert 0 <= extra <= routing
        assert routing < stacked / 10
