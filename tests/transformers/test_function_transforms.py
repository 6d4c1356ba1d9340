"""torch.func, batched gradients and forward mode, and gradients of some of the parameters by `torch.autograd.grad`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import ESTIMATORS, KINDS, block_gradients, block_of, block_truth, data, tensor_of
from families import FAMILIES
from oracle import assert_close
from runs import loss_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_core import DenseMixerConfig, sampled

OURS = r"DenseMixer[\s\S]*(remove\(\)|torch\.autograd)"
"""What the messages have in common: who speaks, and what to do."""

Call = Callable[[nn.Module, Tensor, Tensor], Any]


def value(block: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    return (tensor_of(block(x)) * g).sum()


def grad_of_parameters(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    return grad(lambda p: (tensor_of(functional_call(block, p, (x,))) * g).sum())(parameters)


def vjp_of_parameters(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    return vjp(lambda p: tensor_of(functional_call(block, p, (x,))), parameters)[1](g)


def grad_of_input(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    return grad(lambda x: value(block, x, g))(x)


def jacobian(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    return jacrev(lambda x: tensor_of(block(x)).sum(-1).sum(0))(x)


def grads_of_samples(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    """Each sample's own gradient, as for differential privacy."""
    return vmap(grad(lambda x, g: value(block, x[None], g[None])))(x, g)


def batch_of_gradients(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(tensor_of(block(x)), x, torch.stack([g, 2 * g]), is_grads_batched=True)


def vectorised_jacobian(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    return torch.autograd.functional.jacobian(lambda x: tensor_of(block(x)).sum(-1).sum(0), x, vectorize=True)


def backward_through_vmap(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    y = vmap(lambda x: tensor_of(block(x[None])))(x)
    return torch.autograd.grad((y.squeeze(1) * g).sum(), list(block.parameters()), allow_unused=True)


TRANSFORMS: list[Call] = [
    grad_of_parameters,
    vjp_of_parameters,
    grad_of_input,
    jacobian,
    grads_of_samples,
    batch_of_gradients,
    vectorised_jacobian,
    backward_through_vmap,
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("family", KINDS)
def test_an_error_that_says_what_to_do(family: str, transform: Call) -> None:
    """The host can do it, and so it can once the handle is removed. A step in between is exact."""
    block, (x, g) = block_of(family, "batched_mm"), data()
    host = transform(block, x, g)
    truth = block_truth(FAMILIES[family], block, x, g, "densemixer")
    handle = apply_densemixer(block)
    for _ in range(2):
        with pytest.raises((UnsupportedModelError, RuntimeError), match=OURS):
            transform(block, x, g)
        assert_close(block_gradients(block, x, g), truth)
    handle.remove()
    block.zero_grad()
    torch.testing.assert_close(transform(block, x, g), host)


def dual_numbers(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(tensor_of(block(forward_ad.make_dual(x, g)))).tangent


def jvp_of_input(block: nn.Module, x: Tensor, g: Tensor) -> Any:
    return jvp(lambda x: tensor_of(block(x)), (x,), (g,))


@pytest.mark.parametrize("transform", [dual_numbers, jvp_of_input], ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("family", KINDS)
def test_forward_mode(family: str, transform: Call) -> None:
    """The host's tangents, since the outputs are the host's; or an error as above."""
    block, (x, g) = block_of(family, "batched_mm"), data()
    host = transform(block, x, g)
    with apply_densemixer(block):
        try:
            ours = transform(block, x, g)
        except (UnsupportedModelError, RuntimeError) as error:
            message = str(error)
        else:
            torch.testing.assert_close(ours, host)
            message = ""
        assert not message or re.search(OURS, message)
        with torch.no_grad():
            torch.testing.assert_close(transform(block, x, g), host)


@pytest.mark.parametrize("family", KINDS)
def test_vmap_without_gradients(family: str) -> None:
    block, (x, _) = block_of(family, "batched_mm"), data()
    with torch.no_grad():
        host = vmap(lambda x: tensor_of(block(x[None])))(x)
        with apply_densemixer(block):
            assert torch.equal(vmap(lambda x: tensor_of(block(x[None])))(x), host)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", KINDS)
def test_other_parameters_for_a_call(family: str, estimator: str) -> None:
    """`functional_call` without a transform: the gradient is that of the parameters of the call."""
    block, other, (x, g) = block_of(family), block_of(family, seed=1), data()
    expected = block_truth(FAMILIES[family], other, x, g, estimator)
    del expected["input"]
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    everything = {**parameters, **dict(other.named_buffers())}
    with apply_densemixer(block, DenseMixerConfig(estimator)):
        y = tensor_of(functional_call(block, everything, (x,)))
        y.backward(g)
    assert_close({name: p.grad for name, p in parameters.items() if p.grad is not None}, expected)
    assert all(p.grad is None for p in block.parameters())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The extra passes that ran."""
    found: list[str] = []
    for name in ("expert_dots", "sampled_dots"):
        evaluate = getattr(sampled, name)
        monkeypatch.setattr(
            sampled, name, lambda *args, name=name, evaluate=evaluate: found.append(name) or evaluate(*args)
        )
    return found


CONFIGS = {
    "densemixer": DenseMixerConfig(),
    "centered": DenseMixerConfig("centered"),
    "budget": DenseMixerConfig(budget=0.5),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", KINDS)
def test_gradients_of_experts_alone_need_no_extra_pass(family: str, config: str, passes: list[str]) -> None:
    block, (x, g) = block_of(family), data()
    x.requires_grad_()
    experts = list(block.experts.parameters())
    host = torch.autograd.grad(tensor_of(block(x)), experts, g)
    with apply_densemixer(block, CONFIGS[config]):
        found = torch.autograd.grad(tensor_of(block(x)), experts, g)
        assert not passes
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, host, strict=True))
        for wanted in ([getattr(block, FAMILIES[family].router).weight], [x], [*experts, x]):
            passes.clear()
            torch.autograd.grad(tensor_of(block(x)), wanted, g)
            assert len(passes) == 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_of_one_layers_experts(family: str, passes: list[str]) -> None:
    """Below a layer its own router takes part."""
    model = FAMILIES[family].build()
    first, last = (list(block.experts.parameters()) for block in FAMILIES[family].blocks(model))
    with apply_densemixer(model):
        torch.autograd.grad(loss_of(model), last)
        assert not passes
        torch.autograd.grad(loss_of(model), first)
        assert len(passes) == 1


def test_a_router_that_is_frozen_between_forward_and_backward(passes: list[str]) -> None:
    """The graph knows of the router, as the host's does."""
    of, block, (x, g) = FAMILIES["qwen3_moe"], block_of("qwen3_moe"), data()
    truth = block_truth(of, block, x, g, "densemixer")
    with apply_densemixer(block):
        inputs = x.clone().requires_grad_()
        output = block(inputs)
        block.gate.requires_grad_(False)
        output.backward(g)
    assert passes == ["expert_dots"]
    assert_close({"input": inputs.grad}, {"input": truth["input"]})
