"""Experts whose gate and up projection are two tensors: the same numbers, and never a copy of all experts."""

from __future__ import annotations

import pytest
import torch
from layers import Case, Layer
from test_straight_through import LiveBytes

from densemixer_core import ExpertWeights, Known, StackedExperts, expert_dots, routed_output, sampled_dots


def joined(layer: Layer) -> StackedExperts:
    up, down, up_bias, down_bias, scale, gate = layer.weights
    assert gate is not None
    whole = torch.cat([gate, up], -1 if layer.case.transposed else 1)
    return StackedExperts(ExpertWeights(whole, down, up_bias, down_bias, scale), layer.layout)


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_the_numbers_are_those_of_one_tensor(transposed: bool) -> None:
    layer = Layer(Case(apart=True, bias=True, scale=True, transposed=transposed, identities=1, zeros=1))
    apart, whole = StackedExperts(layer.weights, layer.layout), joined(layer)
    torch.testing.assert_close(expert_dots(layer.x, layer.g, apart), expert_dots(layer.x, layer.g, whole))
    known = Known(torch.rand(layer.case.tokens, layer.case.scored), torch.ones(layer.case.tokens, 1).double())
    drawn = [sampled_dots(layer.x, layer.g, known, 20, 0, experts) for experts in (apart, whole)]
    torch.testing.assert_close(*drawn)
    weights = torch.rand(layer.index.shape).double()
    outputs = [routed_output(layer.x, layer.index, weights, experts) for experts in (apart, whole)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("pairs", [None, 40])
@torch.no_grad()
def test_no_copy_of_all_experts(pairs: int | None) -> None:
    layer = Layer(Case(tokens=8, hidden=64, ffn=48, experts=32, k=2, apart=True), torch.float32)
    known = Known(torch.rand(8, 32), torch.ones(8, 1))

    def peak(experts: StackedExperts) -> int:
        with LiveBytes() as live:
            if pairs is None:
                expert_dots(layer.x, layer.g, experts)
            else:
                sampled_dots(layer.x, layer.g, known, pairs, 0, experts)
        return live.peak

    all_gates = layer.weights.up.numel() * layer.weights.up.element_size()
    copied = joined(layer)
    assert peak(StackedExperts(layer.weights, layer.layout)) < all_gates / 2
    with LiveBytes() as live:
        joined(layer)
    assert live.peak > all_gates
    assert peak(copied) < all_gates / 2
