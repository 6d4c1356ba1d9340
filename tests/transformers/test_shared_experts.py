"""Experts that several layers share, layers that are called twice, and experts that somebody writes to in between."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from blocks import KINDS, block_of, collected, data, selected, tensor_of
from families import FAMILIES, Family
from oracle import Float64, assert_close
from runs import gradients, loss_of, selections
from torch import Tensor, nn

from densemixer_adapters.transformers import apply_densemixer, attached_layers
from densemixer_core import DenseMixerConfig


def oracle_of(family: Family, model: nn.Module, indices: list[Tensor], estimator: str) -> nn.Module:
    """Like `Family.oracle`, for models whose layers may be one and the same: each call takes the next selection."""
    dense, left = copy.deepcopy(model).double(), list(indices)

    def forward(self: nn.Module, x: Tensor) -> Any:
        return family.oracle_forward(left.pop(0), estimator)(self, x)

    for block in family.blocks(dense):
        block.forward = forward.__get__(block)
    return dense


def share_experts(family: Family, model: Any) -> None:
    blocks = family.blocks(model)
    for block in blocks[1:]:
        block.experts = blocks[0].experts


def share_router(family: Family, model: Any) -> None:
    blocks = family.blocks(model)
    for block in blocks[1:]:
        setattr(block, family.router, getattr(blocks[0], family.router))


def share_both(family: Family, model: Any) -> None:
    """Blocks of their own, with the parts of one."""
    share_experts(family, model)
    share_router(family, model)


def share_block(family: Family, model: Any) -> None:
    """One block that the model calls in each of its layers."""
    for layer in model.model.layers[1:]:
        layer.mlp = model.model.layers[0].mlp


SHARED = [share_experts, share_router, share_both, share_block]


@pytest.mark.parametrize("share", SHARED, ids=lambda share: share.__name__)
@pytest.mark.parametrize(
    ("family", "estimator"),
    [("qwen3_moe", "densemixer"), ("mixtral", "centered"), ("gpt_oss", "centered"), ("deepseek_v3", "densemixer")],
)
def test_gradients(family: str, estimator: str, share: Callable[[Family, Any], None]) -> None:
    of = FAMILIES[family]
    model = of.build()
    share(of, model)
    with selections(of, model) as indices:
        loss_of(model)
    assert len(indices) == 2
    with Float64():
        expected = gradients(oracle_of(of, model, indices, estimator))
    with apply_densemixer(model, DenseMixerConfig(estimator)) as handle:
        for _ in range(2):
            assert_close(gradients(model), expected)
        assert len(handle.layers) == (1 if share is share_block else 2)
        assert attached_layers(model) == handle.layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_of_two_that_share_is_left_out() -> None:
    """The option `layers` chooses blocks, whoever else calls their experts."""
    of = FAMILIES["qwen3_moe"]
    model = of.build()
    share_experts(of, model)
    with selections(of, model) as indices:
        loss_of(model)
    dense = oracle_of(of, model, indices, "densemixer")
    first = of.oracle_forward(indices[0], "conventional")
    dense.model.layers[0].mlp.forward = first.__get__(dense.model.layers[0].mlp)
    dense.model.layers[1].mlp.forward = of.oracle_forward(indices[1], "densemixer").__get__(dense.model.layers[1].mlp)
    with Float64():
        expected = gradients(dense)
    with apply_densemixer(model, DenseMixerConfig(layers=[1])):
        assert_close(gradients(model), expected)


class Touched:
    """A block whose experts are frozen and whose input needs no gradient, so that the host's backward doesn't need the
    experts' weights: somebody may write to them between forward and backward."""

    def __init__(self, family: str, seed: int = 0) -> None:
        self.family = FAMILIES[family]
        self.block: Any = block_of(family, seed=seed)
        self.block.experts.requires_grad_(False)
        self.x, self.g = data(seed)

    def forward(self) -> Tensor:
        self.block.zero_grad()
        return tensor_of(self.block(self.x))

    def touch(self) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(self.block.experts.parameters()):
                parameter.mul_(1.5 - 0.2 * number)

    def truth(self, estimator: str) -> dict[str, Tensor]:
        """The host's part is that of the forward's weights, ours that of those that the backward finds. It touches."""
        index = selected(self.block, self.x)
        dense = copy.deepcopy(self.block).double()
        before = self.family.formula(copy.deepcopy(dense))
        self.touch()
        after = self.family.formula(copy.deepcopy(self.block).double())
        x = self.x.reshape(-1, 64).double()
        logits = self.family.logits(dense, x)
        y = oracle.densemixer(x, logits, index, before, "conventional")
        y = y + oracle.densemixer(x, logits, index, after, estimator)
        y = y - oracle.densemixer(x, logits, index, after, "conventional")
        y.backward(self.g.reshape(-1, 64).double())
        router = f"{self.family.router}."
        return {name: gradient for name, gradient in collected(dense).items() if name.startswith(router)}


def of_router(found: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in found.items() if name.startswith(f"{family.router}.")}


@pytest.mark.parametrize("family", KINDS)
def test_frozen_experts_that_are_written_to(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """The unselected experts are those that the backward finds, and one warning says so."""
    estimator = "densemixer"
    layers = [Touched(family, seed) for seed in (0, 1)]
    truths = [copy.deepcopy(layer).truth(estimator) for layer in layers]
    with apply_densemixer(nn.ModuleList([layer.block for layer in layers]), DenseMixerConfig(estimator)):
        for layer in layers:
            layer.forward().backward(layer.g)
        assert not warnings(caplog)
        for layer, truth in zip(layers, truths, strict=True):
            output = layer.forward()
            layer.touch()
            output.backward(layer.g)
            assert_close(of_router(collected(layer.block), layer.family), truth)
    assert len(warnings(caplog)) == 1
    assert "0" in warnings(caplog)[0]
    with apply_densemixer(layers[0].block, DenseMixerConfig(estimator)):
        output = layers[0].forward()
        layers[0].touch()
        output.backward(layers[0].g)
    assert len(warnings(caplog)) == 2  # of another handle


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = (r for r in caplog.records if r.name == "densemixer" and r.levelno == logging.WARNING)
    return [record.getMessage() for record in records if "frozen:" not in record.getMessage()]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_frozen_experts_that_are_loaded_anew(implementation: str) -> None:
    layer = Touched("qwen3_moe")
    layer.block = block_of("qwen3_moe", implementation)
    layer.block.experts.requires_grad_(False)
    truth = copy.deepcopy(layer).truth("densemixer")
    other = copy.deepcopy(layer)
    other.touch()
    with apply_densemixer(layer.block):
        output = layer.forward()
        layer.block.experts.load_state_dict(other.block.experts.state_dict())
        output.backward(layer.g)
    assert_close(of_router(collected(layer.block), layer.family), truth)


@pytest.mark.parametrize("config", [DenseMixerConfig(), DenseMixerConfig("centered", budget=0.5)], ids=str)
def test_experts_that_train_and_are_written_to(config: DenseMixerConfig) -> None:
    """An error in the host, and so with DenseMixer."""
    block, (x, g) = block_of("qwen3_moe"), data()

    def run() -> None:
        output = block(x.clone().requires_grad_())
        with torch.no_grad():
            block.experts.down_proj.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward(g)

    run()
    with apply_densemixer(block, config):
        run()
