"""What lives on after a forward, a step or a failure: what the host keeps, and nothing of ours."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import ESTIMATORS, KINDS, block_gradients, block_of, block_truth, data, selected
from failures import FAILURES, fail_after_experts, fail_after_router, fail_in_experts, failing
from families import FAMILIES, tokens
from living import living_bytes, peak_bytes
from lora import wrapped
from oracle import Float64, assert_close
from runs import gradients, loss_of, selections
from torch import Tensor, nn

from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_core import DenseMixerConfig

CHECKPOINTING: dict[str, bool | None] = {"no checkpointing": None, "reentrant": True, "non-reentrant": False}


def checkpointed(model: Any, how: str) -> Any:
    if CHECKPOINTING[how] is not None:
        model.enable_input_require_grads()
        options = {"use_reentrant": CHECKPOINTING[how]}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def step(model: nn.Module) -> None:
    loss_of(model, tokens(4, 32)).backward()
    model.zero_grad(set_to_none=True)


def full(family: str) -> nn.Module:
    return FAMILIES[family].build(num_hidden_layers=4)


def frozen_routers(family: str) -> nn.Module:
    model = full(family)
    for block in FAMILIES[family].blocks(model):
        getattr(block, FAMILIES[family].router).requires_grad_(False)
    return model


def lora(on: str) -> Callable[[str], nn.Module]:
    return lambda family: wrapped(FAMILIES[family], full(family), on, "neither")


# Where DenseMixer has nothing to do: the model and the estimator.
IDLE: dict[str, tuple[Callable[[str], nn.Module], str]] = {
    "conventional": (full, "conventional"),
    "frozen routers": (frozen_routers, "centered"),
    "LoRA on attention": (lora("attention"), "densemixer"),
    "LoRA on experts": (lora("experts"), "densemixer"),
}


@pytest.mark.parametrize(
    ("family", "idle", "how"),
    [
        ("gpt_oss", "conventional", "non-reentrant"),
        ("mixtral", "frozen routers", "non-reentrant"),
        *(("qwen3_moe", idle, "non-reentrant") for idle in IDLE),
        *(("qwen3_moe", "conventional", how) for how in ("no checkpointing", "reentrant")),
    ],
)
def test_a_step_with_nothing_to_train_takes_the_hosts_memory(family: str, idle: str, how: str) -> None:
    build, estimator = IDLE[idle]
    model = checkpointed(build(family), how)
    step(model)
    peak, kept = peak_bytes(lambda: step(model)), living_bytes(lambda: step(model))
    with apply_densemixer(model, DenseMixerConfig(estimator)):
        step(model)
        assert peak_bytes(lambda: step(model)) <= 1.02 * peak
        assert living_bytes(lambda: step(model)) == kept == 0


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("metrics", [False, True], ids=["", "metrics"])
@pytest.mark.parametrize("config", [DenseMixerConfig(), DenseMixerConfig("centered", budget=0.5)], ids=["", "budget"])
def test_nothing_lives_after_a_step(config: DenseMixerConfig, metrics: bool, how: str) -> None:
    model = checkpointed(full("qwen3_moe"), how)
    with apply_densemixer(model, config) as handle:
        watching = RouterMetrics(handle.layers, model) if metrics else None
        step(model)
        if watching:
            watching.measure()
        kept = living_bytes(lambda: step(model))
        if watching:
            watching.remove()
    layers, experts, hidden = 4, 8, 64
    assert kept <= (layers * (2 * experts * hidden + 2 * experts) * 8 if metrics else 0)  # the sums that are measured


@pytest.mark.parametrize("family", KINDS)
def test_a_forward_whose_loss_is_dropped(family: str) -> None:
    model = full(family)
    with apply_densemixer(model):
        for forward in (loss_of, torch.no_grad()(loss_of)):
            forward(model)
            assert living_bytes(lambda: forward(model) and None) == 0  # noqa: B023


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
@pytest.mark.parametrize(("family", "estimator"), [("qwen3_moe", "densemixer"), ("deepseek_v3", "centered")])
def test_nothing_lives_after_a_failure(family: str, estimator: str, fail: Any, how: str) -> None:
    model = checkpointed(full(family), how)

    def attempt() -> None:
        with failing(FAMILIES[family], model, fail):
            step(model)

    with apply_densemixer(model, DenseMixerConfig(estimator)):
        attempt()
        assert living_bytes(attempt) == 0


@pytest.mark.parametrize("fail", [fail_after_router, fail_in_experts], ids=lambda fail: fail.__name__)
@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_nothing_lives_after_a_failure_in_the_recomputation(how: str, fail: Any) -> None:
    model = checkpointed(full("qwen3_moe"), how)

    def attempt() -> None:
        loss = loss_of(model, tokens(4, 32))
        with failing(FAMILIES["qwen3_moe"], model, fail):
            loss.backward()
        model.zero_grad(set_to_none=True)

    attempt()
    kept = living_bytes(attempt)
    with apply_densemixer(model):
        attempt()
        assert living_bytes(attempt) == kept


@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
@pytest.mark.parametrize(
    ("family", "estimator"),
    [("qwen3_moe", "densemixer"), ("mixtral", "centered"), ("gpt_oss", "centered"), ("deepseek_v3", "densemixer")],
)
def test_a_smaller_batch_after_a_failure(family: str, estimator: str, fail: Any) -> None:
    """What `auto_find_batch_size` does."""
    of = FAMILIES[family]
    model = full(family)
    with selections(of, model) as indices:
        gradients(model)
    with Float64():
        truth = gradients(of.oracle(model, indices, estimator))
    with apply_densemixer(model, DenseMixerConfig(estimator)):
        with failing(of, model, fail):
            step(model)
        for _ in range(2):
            assert_close(gradients(model), truth)


@pytest.mark.parametrize("fail", [fail_in_experts, fail_after_experts], ids=lambda fail: fail.__name__)
def test_an_interrupt(fail: Any) -> None:
    """Who stops a cell of a notebook, and goes on: the next forward is right, and nothing of the stopped one lives."""
    model = full("qwen3_moe")

    def stopped_and_then_a_step() -> None:
        with failing(FAMILIES["qwen3_moe"], model, fail, KeyboardInterrupt):
            step(model)
        step(model)

    with apply_densemixer(model):
        stopped_and_then_a_step()
        assert living_bytes(stopped_and_then_a_step) == 0
        ours = gradients(model)
    fresh = full("qwen3_moe")
    with apply_densemixer(fresh):
        assert_close(ours, gradients(fresh), 0)


@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
def test_an_evaluation_after_an_interrupt(fail: Any) -> None:
    of, model = FAMILIES["qwen3_moe"], full("qwen3_moe")
    ids = tokens(4, 32)
    with torch.no_grad():
        expected = loss_of(model, ids)
    with apply_densemixer(model):
        with failing(of, model, fail, KeyboardInterrupt):
            step(model)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(loss_of(model, ids), expected)
        with failing(of, model, fail, KeyboardInterrupt):
            step(model)
        with torch.no_grad(), failing(of, model, fail):
            loss_of(model, ids)
        step(model)


@pytest.mark.parametrize("family", KINDS)
def test_a_router_called_alone_keeps_nothing(family: str) -> None:
    block = block_of(family)
    router = getattr(block, FAMILIES[family].router)
    x = data()[0].reshape(-1, 64)

    def alone() -> None:
        router(x.requires_grad_())

    with apply_densemixer(block):
        alone()
        assert living_bytes(alone) == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", KINDS)
def test_scores_of_a_router_called_alone_never_meet_the_experts(family: str, estimator: str) -> None:
    """Neither experts that are called alone later nor the block's own call."""
    of, block = FAMILIES[family], block_of(family)
    (x, g), other = data(), data(seed=1)[0].reshape(-1, 64)
    truth, index = block_truth(of, block, x, g, estimator), selected(block, x)
    router = getattr(block, of.router)
    with apply_densemixer(block, DenseMixerConfig(estimator)):
        assert_close(block_gradients(block, x, g), truth)
        router(other)
        assert_close(block_gradients(block, x, g), truth)
        block.zero_grad()
        router(other)
        with contextlib.suppress(UnsupportedModelError):
            block.experts(x.reshape(-1, 64), index, torch.full(index.shape, 0.5)).sum().backward()
        assert all(parameter.grad is None for parameter in router.parameters())
        assert_close(block_gradients(block, x, g), truth)


def test_scores_of_a_router_called_alone_dont_stand_in_for_the_blocks_own() -> None:
    """A block that has come to call its router other than as a module is an error, whatever ran before."""
    block: Any = block_of("qwen3_moe")
    x = data()[0]
    router = block.gate.forward

    def forward(hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, 64)
        _, weights, index = router(rows)
        return block.experts(rows, index, weights).reshape(hidden_states.shape)

    block.forward = forward
    with apply_densemixer(block):
        for _ in range(2):
            block.gate(data(seed=1)[0].reshape(-1, 64))
            with pytest.raises(UnsupportedModelError, match="`gate`"):
                block(x)


def test_a_router_that_somebody_looks_at_within_the_call() -> None:
    """A monitor that calls the router once more, for numbers to log, changes nothing."""
    of, block, (x, g) = FAMILIES["qwen3_moe"], block_of("qwen3_moe"), data()
    truth = block_truth(of, block, x, g, "densemixer")

    def monitor(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            block.gate(torch.zeros_like(args[0]))

    block.experts.register_forward_pre_hook(monitor)
    with apply_densemixer(block):
        assert_close(block_gradients(block, x, g), truth)


@pytest.mark.parametrize("first", ["model", "handle"])
def test_the_model_is_free_with_its_last_reference(first: str) -> None:
    model: Any = full("qwen3_moe")
    handle: Any = apply_densemixer(model)
    step(model)
    experts = weakref.ref(handle.layers[0].experts)
    handle.remove()
    if first == "model":
        del model, handle
    else:
        del handle, model
    assert experts() is None
