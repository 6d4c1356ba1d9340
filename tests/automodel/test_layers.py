"""Automodel's own layer in one process: all gradients are the oracle's, and the forward is the host's bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import oracle
import pytest
import torch
from layers import CASES, HIDDEN, Layer, batches, build, expected
from torch import Tensor

from densemixer_adapters.automodel import apply_densemixer
from densemixer_core import DenseMixerConfig

TOLERANCE = 1e-5


def run(layer: Layer, padding: bool = False, tokens: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """A forward and a backward: output, the input's gradient, and the experts that were selected."""
    (x,), (g,), (mask,) = batches([tokens], padding)
    x = x.to(layer.moe.gate.weight.dtype).requires_grad_()
    index: list[Tensor] = []
    hook = layer.moe.gate.register_forward_hook(lambda module, args, output: index.append(output[1]))
    y = layer.moe(x[None], padding_mask=~mask[None])[0]
    hook.remove()
    y.backward(gradient=g.to(y.dtype))
    return y.detach(), x.grad, index[0]  # type: ignore[return-value]


def errors(layer: Layer, ran: tuple[Tensor, Tensor, Tensor], estimator: str, padding: bool = False) -> dict[str, float]:
    (x,), (g,), (mask,) = batches([len(ran[0])], padding)
    x = x.double().requires_grad_()
    y = expected(layer, x, ran[2], mask, estimator)
    y.backward(gradient=g.double())
    compared = {"y": (ran[0], y.detach()), "x": (ran[1], x.grad)}
    compared |= {name: (value.grad, layer.truth[name].grad) for name, value in layer.moe.named_parameters()}
    return {name: oracle.worst_error(found, truth) for name, (found, truth) in compared.items()}


@pytest.mark.parametrize("experts", ["torch", "torch_mm"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_oracle(case: str, experts: str) -> None:
    padding = experts == "torch_mm"
    for estimator in ("densemixer", "centered"):
        layer = build(case, experts)
        apply_densemixer(layer.moe, DenseMixerConfig(estimator=estimator))
        found = errors(layer, run(layer, padding), estimator, padding)
        assert max(found.values()) <= TOLERANCE, (estimator, found)


@pytest.mark.parametrize("estimator", ["conventional", "densemixer"])
def test_the_forward_is_the_hosts_bit_for_bit(estimator: str) -> None:
    plain, ours = (build("softmax, renormalised") for _ in range(2))
    apply_densemixer(ours.moe, DenseMixerConfig(estimator=estimator))
    before, after = run(plain), run(ours)
    assert torch.equal(before[0], after[0])
    gates = [layer.moe.gate.weight.grad for layer in (plain, ours)]
    if estimator == "conventional":
        assert torch.equal(*gates)
        assert torch.equal(before[1], after[1])
    else:
        assert oracle.relative_error(*gates) > 0.1
        for name in ("gate_and_up_projs", "down_projs"):  # a layer's own experts train as without
            assert torch.equal(getattr(plain.moe.experts, name).grad, getattr(ours.moe.experts, name).grad)


@pytest.mark.parametrize("case", CASES)
def test_half_precision(case: str) -> None:
    """Not far from the oracle, and no check takes a rounding for a fault."""
    layer = build(case, dtype=torch.bfloat16)
    apply_densemixer(layer.moe)
    found = errors(layer, run(layer), "densemixer")
    assert found["gate.weight"] < 0.05, found


@pytest.mark.skipif("weights in float32" not in CASES, reason="Automodel 0.4 has none")
def test_scores_that_are_coarser_than_weights() -> None:
    layer = build("weights in float32", dtype=torch.bfloat16, gate_precision=torch.bfloat16)
    apply_densemixer(layer.moe)
    found = errors(layer, run(layer), "densemixer")
    assert found["gate.weight"] < 0.05, found


def test_a_budget_is_exact_in_the_mean() -> None:
    layer = build("sigmoid, renormalised, scaled")
    (attached,) = apply_densemixer(layer.moe, DenseMixerConfig(budget=0.5)).layers
    (x,), (g,), _ = batches([12], False)
    y = layer.moe(x[None])[0]
    draws = []
    for seed in range(400):
        attached.config = dataclasses.replace(attached.config, seed=seed)
        layer.moe.gate.weight.grad = None
        y.backward(gradient=g, retain_graph=True)
        draws.append(layer.moe.gate.weight.grad.double())
    exact = build("sigmoid, renormalised, scaled")
    apply_densemixer(exact.moe)
    run(exact)
    mean, truth = torch.stack(draws).mean(0), exact.moe.gate.weight.grad
    spread = torch.stack(draws).std(0).norm() / len(draws) ** 0.5
    assert 0 < (mean - truth).norm() < 3 * spread
    assert spread < 0.1 * truth.norm()  # else it would say nothing


def test_without_gradients_nothing_is_done() -> None:
    layer = build("softmax")
    apply_densemixer(layer.moe)
    with torch.no_grad():
        assert layer.moe(torch.randn(1, 3, HIDDEN)).grad_fn is None


def test_no_tokens() -> None:
    layer = build("softmax", "torch_mm")
    apply_densemixer(layer.moe)
    run(layer, padding=True, tokens=2)  # nothing but padding
    assert not layer.moe.gate.weight.grad.any()


def test_a_frozen_gate_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    blocks = torch.nn.ModuleList([build("softmax").moe, build("softmax").moe])
    for block in blocks:
        block.gate.weight.requires_grad_(False)
    apply_densemixer(blocks)
    plain = build("softmax")
    run(plain)
    layer = Layer(blocks[0], plain.config, plain.truth)
    run(layer)
    assert torch.equal(layer.moe.experts.down_projs.grad, plain.moe.experts.down_projs.grad)
    (record,) = caplog.records
    assert "in 2 of 2 layers, whose routers are frozen (0.gate and 1 more)" in record.getMessage()


def test_gates_that_are_frozen_later_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    layers = [build("softmax") for _ in range(3)]
    layers[0].moe.gate.weight.requires_grad_(False)
    apply_densemixer(torch.nn.ModuleList([layer.moe for layer in layers]))
    for layer in layers[1:]:
        layer.moe.gate.weight.requires_grad_(False)
    for layer in layers:
        run(layer)
    messages = [record.getMessage() for record in caplog.records]
    assert ["(0.gate)" in messages[0], "(1.gate and 1 more)" in messages[1]] == [True, True]
    assert len(messages) == 2


def test_metrics_that_nobody_reads_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    layers = [build("softmax") for _ in range(2)]
    apply_densemixer(torch.nn.ModuleList([layer.moe for layer in layers]), DenseMixerConfig(metrics=True))
    for layer in layers:
        run(layer)
    assert caplog.text.count("the option metrics does nothing in this training loop") == 1


def test_taken_off_again() -> None:
    layer = build("softmax")
    hooks = [len(module._forward_hooks) for module in layer.moe.modules()]
    with apply_densemixer(layer.moe) as handle:
        with pytest.raises(RuntimeError, match="attached already"):
            apply_densemixer(layer.moe)
        assert [each.name for each in handle.layers] == [""]
    assert [len(module._forward_hooks) for module in layer.moe.modules()] == hooks
    plain = build("softmax")
    run(layer), run(plain)
    assert torch.equal(layer.moe.gate.weight.grad, plain.moe.gate.weight.grad)


def test_an_option_chooses_layers() -> None:
    blocks = torch.nn.ModuleList([build("softmax").moe for _ in range(3)])
    assert [layer.name for layer in apply_densemixer(blocks, DenseMixerConfig(layers=[-1])).layers] == ["2"]
    with pytest.raises(ValueError, match="the model has 3 Mixture-of-Experts layers"):
        apply_densemixer(blocks, DenseMixerConfig(layers=[7]))


def test_copies_train_by_themselves() -> None:
    layer = build("softmax")
    apply_densemixer(layer.moe)
    run(layer)
    twin = Layer(copy.deepcopy(layer.moe), layer.config, build("softmax").truth)
    twin.moe.zero_grad()
    with torch.no_grad():
        layer.moe.experts.down_projs.zero_()  # which the copy doesn't look at
    found = errors(twin, run(twin), "densemixer")
    assert max(found.values()) <= TOLERANCE, found


def test_what_the_experts_return_is_compared_with_their_weights() -> None:
    layer = build("softmax")
    layer.moe.experts.register_forward_hook(lambda module, args, output: 2 * output, prepend=True)
    apply_densemixer(layer.moe)
    run(layer)  # ours comes first: a later hook is nothing to us
    doubled = build("softmax")
    host: Any = doubled.moe.experts.expert_activation_grouped
    doubled.moe.experts.expert_activation_grouped = lambda inner, weights: 2 * host(inner, weights)
    apply_densemixer(doubled.moe)
    with pytest.raises(RuntimeError, match=r"it is 2 times that.*experts' weights and the activation"):
        run(doubled)


def test_how_the_gate_routes_is_compared_with_what_is_declared() -> None:
    layer = build("softmax")
    layer.moe.gate.register_forward_hook(lambda module, args, output: (output[0].square(), *output[1:]))
    apply_densemixer(layer.moe)
    with pytest.raises(RuntimeError, match="takes its scores to be the softmax of its logits, but its weights are not"):
        run(layer)
