"""The weights of the selected experts are those that the dispatcher gets, and are compared with the router's scores."""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import oracle
import torch
from cases import CASES, SIGMOID, Case
from checks import truth
from moe_layer import batch, build, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from densemixer_adapters.megatron import apply_densemixer
from densemixer_adapters.transformers.checks import EVERY
from densemixer_core import DenseMixerConfig, RoutingMismatchError

BOTH = pytest.mark.parametrize("name", ["softmax after top-k", "softmax before top-k", "sigmoid"])


def squared(probs: Tensor) -> Tensor:
    """What no declaration says."""
    return probs.square()


@BOTH
@pytest.mark.parametrize("when", ["before attaching", "after the first step"])
@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_a_hook_that_scales_all_weights(name: str, estimator: str, when: str) -> None:
    """They are what the experts' outputs are multiplied by."""
    case = CASES[name]
    layer, (x, g) = build(case), batch(case)

    def hook() -> None:
        layer.router.register_forward_hook(lambda router, args, output: (0.5 * output[0], output[1]), prepend=True)

    if when == "before attaching":
        hook()
    with apply_densemixer(layer, DenseMixerConfig(estimator)):
        if when == "after the first step":
            run(layer, x, g)
            layer.zero_grad()
            hook()
        ours, index = run(layer, x, g)
    layer.config.moe_router_topk_scaling_factor = 0.5 * (layer.config.moe_router_topk_scaling_factor or 1.0)
    exact = truth(layer, x, g, index, estimator, torch.float64)
    assert oracle.worst_error(ours.router, exact.router) < 1e-5


@BOTH
def test_selective_checkpointing_replays_what_the_host_computed(name: str) -> None:
    """It replays what it keeps in the order of the first run: nothing of ours may run in one of the two alone."""
    aten = torch.ops.aten
    kept = [aten.mul.Tensor, aten.sub.Tensor, aten.abs.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    layer, (x, g) = build(CASES[name]), batch(CASES[name])
    inner, y = layer.forward, layer(x)[0].detach()

    def square(x: Tensor) -> tuple[Tensor, None]:
        z = 1.0 * inner(x)[0]
        return z * z, None

    layer.forward = lambda x: checkpoint(square, x, use_reentrant=False, context_fn=contexts)
    with apply_densemixer(layer):
        ours, index = run(layer, x, g)
    exact = truth(layer, x, 2 * y * g, index, "densemixer", torch.float64)
    assert oracle.worst_error(ours.router, exact.router) < 1e-5


@BOTH
def test_a_hook_after_which_weights_are_no_multiple_of_the_scores(name: str) -> None:
    layer, (x, _) = build(CASES[name], moe_densemixer=True), batch(CASES[name])
    layer.router.register_forward_hook(lambda router, args, output: (squared(output[0]), output[1]))
    with pytest.raises(RoutingMismatchError, match=r"^Mixture-of-Experts layer 1: .*routes differently"):
        layer(x)


@BOTH
def test_a_patch_after_the_first_step_is_found_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (x, g) = build(CASES[name], moe_densemixer=True), batch(CASES[name])
    run(layer, x, g)
    original = type(layer.router).routing

    def routing(self: Any, *args: Any, **kwargs: Any) -> Any:
        probs, routing_map = original(self, *args, **kwargs)
        return squared(probs), routing_map

    monkeypatch.setattr(type(layer.router), "routing", routing)
    for _ in range(EVERY - 1):
        layer(x)
    with pytest.raises(RoutingMismatchError, match="routes differently"):
        layer(x)


def test_a_capacity_that_is_set_later_is_found_soon() -> None:
    """It drops tokens of experts that have too many."""
    layer, (x, g) = build(Case(SIGMOID), moe_densemixer=True), batch(Case())
    run(layer, x, g)
    layer.config.moe_expert_capacity_factor = 0.5
    for _ in range(EVERY - 1):
        layer(x)
    with pytest.raises(RoutingMismatchError, match="routes differently"):
        layer(x)
