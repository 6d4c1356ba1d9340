"""Router metrics: where they are found, what they say in the plainest cases, and that nothing is kept for them.

That they are right under all kinds of routing, and on several ranks, is in `test_layer` and `test_parallel`.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import torch
from cases import Case
from moe_layer import batch, build, run
from torch import Tensor
from training import Writer, log

from densemixer_adapters.megatron import apply_densemixer
from densemixer_core import DenseMixerConfig

NAMES = {
    f"densemixer/{name}"
    for name in (
        "router_grad_norm",
        "router_grad_share_unselected",
        "router_grad_cosine_conventional",
        "load_entropy",
        "load_max_over_mean",
    )
}
SELECTIVE = Case({"recompute_granularity": "selective", "recompute_modules": ["moe"]})


def step(layer: Any) -> Any:
    layer.zero_grad()
    return run(layer, *batch(Case()))[0]


@pytest.mark.parametrize("by_layer", [True, False])
def test_megatrons_log_has_them(by_layer: bool) -> None:
    layer = build(Case())
    apply_densemixer(layer, DenseMixerConfig(metrics=True))
    board, wandb, sums = Writer(), Writer(), {"densemixer/load_entropy": torch.ones(1)}
    lines = []
    for iteration in (1, 2):
        step(layer)
        lines.append(
            log(
                layer.config,
                iteration,
                writer=board,
                wandb_writer=wandb,
                total_loss_dict=sums,
                per_layer_logging=by_layer,
            )
        )
    written = board.rows[1]
    assert wandb.rows == board.rows == [{}, written, written]
    whole = {name: value for name, value in written.items() if "layer_0" not in name}
    assert set(whole) == NAMES
    assert len(written) == (2 if by_layer else 1) * len(NAMES)
    if lines[0]:  # from 0.17 on
        assert all(f" {name}: {value:.3E} |" in lines[0] for name, value in whole.items())
    else:  # what it prints is a mean over the iterations since it printed last
        whole["densemixer/load_entropy"] += 0.5
        assert {name: sums[name].item() / 2 for name in whole} == pytest.approx(whole)


def test_another_model_of_the_process_takes_no_number() -> None:
    """A critic, or one that training has left behind. Its layers aren't those of multi-token prediction."""
    other, layer = build(Case()), build(Case())
    for model in (other, layer):
        apply_densemixer(model, DenseMixerConfig(metrics=True))
    writer = Writer()
    other(batch(Case())[0])  # no backward, so it says nothing of its gradients
    step(layer)
    log(layer.config, 0, writer=writer, per_layer_logging=True)
    layers = {name.split("/")[1] for row in writer.rows for name in row if name.count("/") == 2}
    assert layers == {"layer_0"}


def test_without_the_option_nothing_is_measured() -> None:
    layer = build(Case())
    handle = apply_densemixer(layer)
    step(layer)
    writer = Writer()
    log(layer.config, 0, writer=writer)
    assert handle.metrics() == {}
    assert not any(writer.rows)


def test_conventional_training() -> None:
    layer = build(Case())
    handle = apply_densemixer(layer, DenseMixerConfig("conventional", metrics=True))
    plain = build(Case())
    gradients, exact = step(layer), step(plain)
    assert torch.equal(gradients.router, exact.router)
    found = handle.metrics()
    assert found["densemixer/router_grad_norm"] == pytest.approx(exact.router.norm().item(), rel=1e-5)
    assert found["densemixer/router_grad_share_unselected"] == 0
    assert found["densemixer/router_grad_cosine_conventional"] == pytest.approx(1)


def test_frozen_routers() -> None:
    layer = build(Case({"moe_shared_expert_intermediate_size": 8}))
    layer.router.requires_grad_(False)
    handle = apply_densemixer(layer, DenseMixerConfig(metrics=True))
    output, _ = layer(batch(Case())[0].requires_grad_())
    output.sum().backward()
    assert handle.metrics() == {"densemixer/router_grad_norm": 0.0, "densemixer/layer_0/router_grad_norm": 0.0}


def test_float16_pairs_left_out() -> None:
    case = Case(dtype=torch.float16)
    layer = build(case)
    handle = apply_densemixer(layer, DenseMixerConfig(metrics=True))
    with torch.no_grad():  # an expert that none of the tokens selects, and that overflows
        layer.router.weight[-1] = 0
        layer.experts.local_experts[-1].linear_fc1.weight.fill_(3e4)
    x, g = batch(case)
    run(layer, x, g)
    found = handle.metrics()
    assert found["densemixer/pairs_left_out"] > 0
    assert found["densemixer/router_grad_norm"] < float("inf")
    assert handle.metrics() == {}


def test_each_step_starts_anew() -> None:
    layer = build(Case())
    handle = apply_densemixer(layer, DenseMixerConfig(metrics=True))
    step(layer)
    first = handle.metrics()
    step(layer)
    assert handle.metrics() == first
    (meter,) = (layer.meter for layer in handle.layers)
    assert meter is not None
    assert meter.total is meter.added is meter.loads is None


def test_removed_nothing_is_left() -> None:
    layer = build(Case())
    step(layer)
    before = set(vars(layer.router)), set(vars(layer.token_dispatcher))
    with apply_densemixer(layer, DenseMixerConfig(metrics=True)) as handle:
        step(layer)
    assert handle.metrics() == {}
    assert (set(vars(layer.router)), set(vars(layer.token_dispatcher))) == before
    assert not layer._forward_hooks
    assert not layer.experts._forward_hooks


def tensors() -> int:
    gc.collect()
    return sum(type(each) is Tensor for each in gc.get_objects())


@pytest.mark.parametrize(("where", "recomputed"), [("experts", False), ("experts", True), ("token_dispatcher", False)])
def test_an_error_in_the_forward_leaves_nothing(where: str, recomputed: bool) -> None:
    """But what Megatron itself leaves."""
    kept = []
    for on in (False, True):
        layer = build(SELECTIVE if recomputed else Case())
        if on:
            apply_densemixer(layer, DenseMixerConfig(metrics=True))
        x, g = batch(Case())
        before = tensors()
        calls = iter([False] * recomputed + [True])
        fail(layer, where, calls)
        with pytest.raises(RuntimeError, match="out of memory"):
            layer(x.requires_grad_())[0].backward(g)
        kept.append(tensors() - before)
        del layer
    assert kept[1] <= kept[0]


def fail(layer: Any, where: str, calls: Any) -> None:
    owner, name = (layer.experts, "forward") if where == "experts" else (layer.token_dispatcher, "token_combine")
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls):
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    setattr(owner, name, failing)
