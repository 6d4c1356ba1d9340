"""A layer in one process: gradients against the oracle, for every router and kind of experts that torchtitan has."""

from __future__ import annotations

import copy
import functools

import pytest

pytest.importorskip("torchtitan", reason="needs torchtitan; run `nox -s torchtitan`")

import oracle
import torch
from titan_layer import CASES, EXPERTS, Float64, batch, build, train, truth
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from densemixer_adapters.torchtitan import apply_densemixer, attached_handle
from densemixer_adapters.torchtitan import experts as weights_of
from densemixer_core import DenseMixerConfig

NAME = next(iter(CASES))
aten = torch.ops.aten
KEPT = [aten.mul.Tensor, aten.sub.Tensor, aten.abs.default, aten.amax.default, aten.gather.default, aten.where.self]


@pytest.fixture(autouse=True)
def exact_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_of, "COMPUTES_IN", torch.float64)


@pytest.mark.parametrize("estimator", ["conventional", "densemixer", "centered"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, estimator: str) -> None:
    moe, (x, g) = build(CASES[name]), batch()
    plain = train(moe, x, g)
    with apply_densemixer(moe, DenseMixerConfig(estimator)) as handle:
        assert len(handle.layers) == 1
        found = train(moe, x, g)
    assert torch.equal(found.output, plain.output)
    expected = truth(moe, x, g, found.index, estimator)
    assert found.gradients.keys() == expected.keys()
    for parameter, gradient in found.gradients.items():
        assert oracle.worst_error(gradient, expected[parameter]) < 1e-12, parameter
    if estimator != "conventional":
        weight = "router.gate.weight"
        assert oracle.relative_error(plain.gradients[weight], found.gradients[weight]) > 0.1


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("name", ["Qwen3", "gpt-oss"])
def test_a_budget_is_unbiased(name: str, estimator: str) -> None:
    moe, (x, g) = build(CASES[name]), batch(tokens=32)
    expected = truth(moe, x, g, train(moe, x, g).index, estimator)["router.gate.weight"]
    draws = []
    for seed in range(100):
        with apply_densemixer(moe, DenseMixerConfig(estimator, budget=0.25, seed=seed)):
            draws.append(train(moe, x, g).gradients["router.gate.weight"])
    errors = torch.stack(draws) - expected
    spread = errors.square().sum((1, 2)).mean().sqrt()
    assert spread / expected.norm() > 0.05  # one draw is no more than an estimate
    assert errors.mean(0).norm() < 2 * spread / len(draws) ** 0.5


def test_selective_checkpointing_replays_what_the_host_computed() -> None:
    """It replays what it keeps in the order of the first run: nothing of ours may run in one of the two alone."""
    moe, (x, g) = build(CASES[NAME]), batch()
    contexts = functools.partial(create_selective_checkpoint_contexts, KEPT)
    inner, y = moe.forward, train(moe, x, g).output

    def square(x: torch.Tensor) -> torch.Tensor:
        z = 1.0 * inner(x)
        return z * z

    moe.forward = lambda x: checkpoint(square, x, use_reentrant=False, context_fn=contexts)
    with apply_densemixer(moe):
        found = train(moe, x, g)
    for name, gradient in truth(moe, x, 2 * y * g, found.index, "densemixer").items():
        assert oracle.worst_error(found.gradients[name], gradient) < 1e-12, name


def test_remove_gives_back_everything() -> None:
    moe, (x, g) = build(CASES[NAME]), batch()
    dispatcher = moe.routed_experts.token_dispatcher

    def state() -> tuple[object, ...]:
        hooks = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in moe.modules()]
        return dict(vars(dispatcher)), hooks, list(moe.state_dict())

    before, plain = state(), train(moe, x, g)
    handle = apply_densemixer(moe)
    assert [layer.block for layer in attached_handle(moe).layers] == [moe]
    train(moe, x, g)
    assert state()[2] == before[2]
    handle.remove()
    handle.remove()
    assert state() == before
    assert attached_handle(moe).layers == []
    after = train(moe, x, g)
    for name, gradient in plain.gradients.items():
        assert torch.equal(after.gradients[name], gradient), name


def test_what_others_have_overridden_stays() -> None:
    """On the instance, before us: it is called, and it is back afterwards."""
    moe, (x, g) = build(CASES[NAME]), batch()
    dispatcher, calls = moe.routed_experts.token_dispatcher, []
    host = dispatcher.combine

    def combine(*args: object) -> object:
        calls.append(args)
        return host(*args)

    dispatcher.combine = combine
    with apply_densemixer(moe):
        train(moe, x, g)
    assert len(calls) == 1
    assert dispatcher.combine is combine


def test_a_copy_trains_with_its_own_weights() -> None:
    moe, (x, g) = build(CASES[NAME]), batch()
    apply_densemixer(moe)
    other = copy.deepcopy(moe)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    (layer,) = attached_handle(other).layers
    assert layer.block is other
    found = train(other, x, g)
    expected = truth(other, x, g, found.index, "densemixer")
    assert oracle.worst_error(found.gradients["router.gate.weight"], expected["router.gate.weight"]) < 1e-12
    attached_handle(other).remove()
    assert len(attached_handle(moe).layers) == 1


def test_a_router_that_is_frozen_later_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    moe, (x, g) = build(CASES[NAME]), batch()
    other = build(CASES[NAME])
    with apply_densemixer(torch.nn.ModuleList([moe, other])):
        train(moe, x, g)
        assert "frozen" not in caplog.text
        moe.router.requires_grad_(False)
        other.router.requires_grad_(False)
        with torch.no_grad(), Float64():
            moe(x)  # not a training forward
        assert "frozen" not in caplog.text
        for layer in (moe, other, moe):
            train(layer, x, g)
    (warning,) = [record.getMessage() for record in caplog.records if "frozen" in record.getMessage()]
    assert "in 2 of 2 layers, whose routers are frozen (0.router and 1 more): such a layer trains as without" in warning
    assert "a LoRA converter" in warning


def test_routers_that_were_frozen_already_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    frozen, other, (x, g) = build(CASES[NAME]), build(CASES[NAME]), batch()
    frozen.router.requires_grad_(False)
    with apply_densemixer(torch.nn.ModuleList([other, frozen])):
        train(frozen, x, g)
        (warning,) = [record.getMessage() for record in caplog.records if "frozen" in record.getMessage()]
        assert "in 1 of 2 layers, whose routers are frozen (1.router)" in warning
        other.router.requires_grad_(False)
        train(other, x, g)
    assert "in 2 of 2 layers, whose routers are frozen (0.router)" in caplog.records[-1].getMessage()


def test_conventional_training_needs_no_router(caplog: pytest.LogCaptureFixture) -> None:
    moe, (x, g) = build(CASES[NAME]), batch()
    with apply_densemixer(moe, DenseMixerConfig("conventional")):
        moe.router.requires_grad_(False)
        train(moe, x, g)
    assert "frozen" not in caplog.text


def test_a_frozen_router_trains_as_without(caplog: pytest.LogCaptureFixture) -> None:
    moe, (x, g) = build(CASES[NAME]), batch()
    moe.router.requires_grad_(False)
    plain = train(moe, x, g)
    with apply_densemixer(moe):
        found = train(moe, x, g)
    assert "routers are frozen" in caplog.text
    for name, gradient in plain.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name


def test_nothing_is_added_without_gradients() -> None:
    moe, (x, _) = build(CASES[NAME]), batch()
    with apply_densemixer(moe) as handle, torch.no_grad():
        moe.float()(x.detach().float())
    (layer,) = handle.layers
    assert layer._scores is None
    assert layer._routed is None


def test_an_error_in_the_experts_leaves_nothing_behind() -> None:
    moe, (x, g) = build(CASES[NAME]), batch()
    with apply_densemixer(moe) as handle:
        moe.routed_experts.inner_experts.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(moe, x, g)
        assert handle.layers[0]._scores is None


def test_bfloat16_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in bfloat16, nothing stood in for: as close to the oracle as bfloat16 goes."""
    monkeypatch.undo()
    moe, (x, g) = build(CASES[NAME], torch.float32), batch(torch.float32, tokens=64)

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []
        spy = moe.router.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        moe.zero_grad()
        moe(x).backward(gradient=g)
        spy.remove()
        return moe.router.gate.weight.grad.clone(), seen[0].flatten(0, -2)

    plain, index = gradients()
    with apply_densemixer(moe):
        found, _ = gradients()
    expected = truth(moe, x, g, index, "densemixer")["router.gate.weight"]
    assert oracle.relative_error(found, expected) < 2e-2
    assert oracle.relative_error(plain, expected) > 0.1


def test_no_copy_of_all_experts() -> None:
    """Their gate and up projection lie apart."""
    moe = build(CASES[NAME])
    read = weights_of.read_experts(moe.routed_experts.inner_experts)
    inner = moe.routed_experts.inner_experts
    assert read.weights.gate is not None
    assert read.weights.gate.data_ptr() == inner.w1_EFD.data_ptr()
    assert read.weights.up.data_ptr() == inner.w3_EFD.data_ptr()
    assert len(read.weights.down) == EXPERTS
