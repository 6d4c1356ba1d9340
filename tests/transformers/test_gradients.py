"""Gradients of whole models and of single layers against the dense float64 oracle."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from families import FAMILIES, IMPLEMENTATIONS, Family
from runs import gradients, loss_of, selections
from torch import Tensor, nn

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["conventional", "densemixer", "centered"]


def ours_and_truth(family: Family, model: nn.Module, estimator: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with apply_densemixer(model, DenseMixerConfig(estimator)), selections(family, model) as indices:
        ours = gradients(model)
    with oracle.Float64():
        truth = gradients(family.oracle(model, indices, estimator))
    assert ours.keys() == truth.keys()
    return ours, truth


def routers(names: dict[str, Tensor]) -> list[str]:
    return [name for name in names if name.endswith((".gate.weight", ".router.weight"))]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])  # torch's grouped_mm has no float64
@pytest.mark.parametrize("family", FAMILIES)
def test_float64(family: str, implementation: str, estimator: str) -> None:
    with oracle.Float64():
        model = FAMILIES[family].build(implementation).double()
        ours, truth = ours_and_truth(FAMILIES[family], model, estimator)
    for name, expected in truth.items():
        assert oracle.worst_error(ours[name], expected) <= 1e-10, name


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, implementation: str, estimator: str) -> None:
    model = FAMILIES[family].build(implementation)
    ours, truth = ours_and_truth(FAMILIES[family], model, estimator)
    for name, expected in truth.items():
        assert oracle.worst_error(ours[name], expected) <= 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_unselected_experts_teach_the_router(family: str) -> None:
    """The tests above would pass without the extra term if it were small: it isn't."""
    model = FAMILIES[family].build()
    conventional = gradients(model)
    with apply_densemixer(model):
        ours = gradients(model)
    assert len(routers(ours)) == 2
    for name in routers(ours):
        assert oracle.relative_error(ours[name], conventional[name]) > 0.1, name


def layer_gradients(block: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    output = block(x)
    (output[0] if isinstance(output, tuple) else output).backward(g)
    return {"input": x.grad, **{name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_train_bitwise_as_before(family: str, implementation: str, dtype: torch.dtype) -> None:
    block = FAMILIES[family].blocks(FAMILIES[family].build(implementation))[0].to(dtype)
    x, g = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = layer_gradients(block, x, g)
    with apply_densemixer(block):
        after = layer_gradients(block, x, g)
    different = {name for name in before if not torch.equal(before[name], after[name])}
    router = FAMILIES[family].router
    assert {"input", f"{router}.weight"} <= different <= {"input", f"{router}.weight", f"{router}.bias"}


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_by_the_truth(family: str, implementation: str, mode: str, estimator: str) -> None:
    """Our error against the float64 truth is at most 10 % above that of the dense implementation in the same dtype."""
    dtype = torch.float16 if mode == "float16" else torch.bfloat16
    autocast = torch.autocast("cpu", dtype, enabled=mode == "autocast")
    of = FAMILIES[family]
    whole = of.build(implementation)
    block = of.blocks(whole)[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(parameter.to(dtype))  # the same weights, exactly, in every dtype
    x, g = torch.randn(2, 4, 32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    if mode == "autocast":
        x, g = x.float(), g.float()
    else:
        block.to(dtype)

    indices: list[Tensor] = []
    hook = block.experts.register_forward_pre_hook(lambda module, args: indices.append(args[1]))
    with apply_densemixer(block, DenseMixerConfig(estimator)), autocast:
        ours = layer_gradients(block, x, g)
    hook.remove()

    dense = copy.deepcopy(block)
    dense.forward = of.oracle_forward(indices[0], estimator).__get__(dense)
    with autocast:
        reference = layer_gradients(dense, x, g)
    with oracle.Float64():
        truth = layer_gradients(dense.double(), x.double(), g.double())
    for name, expected in truth.items():
        allowed = 1.1 * oracle.relative_error(reference[name], expected) + torch.finfo(dtype).eps
        assert oracle.relative_error(ours[name], expected) <= allowed, name


def test_gradients_accumulate() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        once = gradients(model)
        loss_of(model).backward()
    name = "model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, 2 * once[name])


def test_probabilities_and_logits_from_the_router_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of transformers differ in what a router returns first; the other convention is made here by a hook."""
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        as_installed = gradients(model)

    def other_convention(router: nn.Module, args: tuple, output: tuple) -> tuple:
        first, *rest = output
        probabilities = torch.allclose(first.sum(-1), torch.ones(()))
        return (first.log() if probabilities else first.softmax(-1), *rest)

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(other_convention)
    with apply_densemixer(model):
        as_in_other_versions = gradients(model)
    for name, expected in as_installed.items():
        assert oracle.worst_error(as_in_other_versions[name], expected) <= 1e-5, name
