"""Somebody's hook that changes the output of a layer, or of its experts, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import ESTIMATORS, KINDS, block_gradients, block_of, block_truth, data, tensor_of
from families import FAMILIES, IMPLEMENTATIONS
from oracle import assert_close
from runs import gradients
from torch import Tensor, nn
from torch.nn import functional as F

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

PAIRS = [("qwen3_moe", "centered"), ("mixtral", "densemixer"), ("gpt_oss", "centered"), ("deepseek_v3", "densemixer")]


def _mask(y: Tensor) -> None:
    y.view(16, 64)[:, 5:9] = 0


# What a hook does in place, and the same for the oracle.
CHANGES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "add_": (lambda y: y.add_(1.5), lambda y: y + 1.5),
    "mul_": (lambda y: y.mul_(0.5), lambda y: y * 0.5),
    "part": (_mask, lambda y: torch.cat([y[:, :5], torch.zeros_like(y[:, 5:9]), y[:, 9:]], 1)),
    "tanh_": (lambda y: y.tanh_(), lambda y: y.tanh()),
}


def in_place(change: Callable[[Tensor], Any]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        change(tensor_of(output))

    return hook


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("family", "estimator"), PAIRS)
def test_of_the_experts(family: str, estimator: str, change: str, when: str) -> None:
    of, block, (x, g) = FAMILIES[family], block_of(family), data()
    operation, same = CHANGES[change]
    truth = block_truth(of, block, x, g, estimator, same)
    if when == "before":
        block.experts.register_forward_hook(in_place(operation))
    with apply_densemixer(block, DenseMixerConfig(estimator)):
        if when == "after":
            block.experts.register_forward_hook(in_place(operation))
        assert_close(block_gradients(block, x, g), truth)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_by_each_kernel(implementation: str, estimator: str) -> None:
    """Whatever tensor it is that the experts return."""
    of, block, (x, g) = FAMILIES["qwen3_moe"], block_of("qwen3_moe", implementation), data()
    operation, same = CHANGES["mul_"]
    truth = block_truth(of, block, x, g, estimator, same)
    with apply_densemixer(block, DenseMixerConfig(estimator)):
        block.experts.register_forward_hook(in_place(operation))
        ours = block_gradients(block, x, g)
    assert_close(ours, truth)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("on", ["experts", "block"])
@pytest.mark.parametrize("family", KINDS)
def test_dropout(family: str, on: str, estimator: str) -> None:
    of, block, (x, g) = FAMILIES[family], block_of(family), data()
    masks: list[Tensor] = []

    def dropout(module: nn.Module, args: Any, output: Any) -> None:
        y = tensor_of(output)
        before = y.detach().clone()
        F.dropout(y, 0.3, training=True, inplace=True)
        masks.append((y.detach() / before).reshape(16, 64).double())

    block.eval()
    plain = block_of(family)
    with apply_densemixer(block, DenseMixerConfig(estimator)):
        (block if on == "block" else block.experts).register_forward_hook(dropout)
        ours = block_gradients(block, x, g)
    mask = masks[0]
    assert 0.1 < (mask == 0).double().mean() < 0.5
    if on == "experts":
        truth = block_truth(of, plain, x, g, estimator, lambda y: y * mask)
    else:
        truth = block_truth(of, plain, x, g.double() * mask.reshape(g.shape), estimator)
    assert_close(ours, truth)


@pytest.mark.parametrize("change", ["add_", "mul_", "part"])
@pytest.mark.parametrize(("family", "estimator"), PAIRS)
def test_of_the_block(family: str, estimator: str, change: str) -> None:
    of, block, (x, g) = FAMILIES[family], block_of(family), data()
    operation, same = CHANGES[change]
    factor = torch.ones(16, 64, requires_grad=True)
    same(factor).backward(g.reshape(16, 64))  # the gradient of the output before the change
    truth = block_truth(of, block, x, factor.grad.reshape(g.shape), estimator)
    with apply_densemixer(block, DenseMixerConfig(estimator)):
        block.register_forward_hook(in_place(operation))
        ours = block_gradients(block, x, g)
    assert_close(ours, truth)


@pytest.mark.parametrize("on", ["experts", "block"])
@pytest.mark.parametrize("family", KINDS)
def test_the_outputs_and_the_experts_gradients_stay_those_of_the_host(family: str, on: str) -> None:
    block, (x, g) = block_of(family, "eager"), data()
    (block if on == "block" else block.experts).register_forward_hook(in_place(CHANGES["mul_"][0]))
    plain, host = tensor_of(block(x)), block_gradients(block, x, g)
    with apply_densemixer(block):
        assert torch.equal(tensor_of(block(x)), plain)
        ours = block_gradients(block, x, g)
    router = FAMILIES[family].router
    same = {name for name in host if torch.equal(host[name], ours[name])}
    assert same == {name for name in host if name != "input" and not name.startswith(f"{router}.")}


@pytest.mark.parametrize("family", KINDS)
def test_in_a_model_under_checkpointing(family: str) -> None:
    """What a layer keeps is there when the backward computes it again."""
    model = FAMILIES[family].build("eager")
    for block in FAMILIES[family].blocks(model):
        block.experts.register_forward_hook(in_place(CHANGES["mul_"][0]))
    with apply_densemixer(model, DenseMixerConfig("centered")):
        plain = gradients(model)
        for reentrant in (True, False):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            again = gradients(model)
            assert all(torch.equal(plain[name], again[name]) for name in plain)
