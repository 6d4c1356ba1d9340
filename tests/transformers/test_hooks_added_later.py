"""What a router does may change after attaching: a hook that somebody adds to it, an option that is switched.

Registered before attaching, from the start on, or from a later step on, it must come to the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import FORMULAS, Formula, linear
from oracle import assert_close
from single import Single, router_of, tokens
from torch import Tensor, nn

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]
WHEN = ["before attaching", "before the first step", "after the first step"]

# Those whose routers select themselves in every supported version of transformers.
SOFTMAX = ["mixtral", "gpt_oss", "qwen3_moe", "olmoe"]


class Masks:
    """Takes experts away from the selection, others at each step, and selects again."""

    def __init__(self) -> None:
        self.masked = [1, 4]

    def change(self) -> None:
        self.masked = [0, 3, 6]

    def logits(self, router: Any, x: Tensor) -> Tensor:
        masked = torch.zeros(8, dtype=torch.bool)
        masked[self.masked] = True
        return linear(router, x).masked_fill(masked, -torch.inf)


class Temperature:
    """Divides the logits by a number that changes from step to step."""

    def __init__(self) -> None:
        self.value = 2.5

    def change(self) -> None:
        self.value = 0.7

    def logits(self, router: Any, x: Tensor) -> Tensor:
        return linear(router, x) / self.value


def add_to(router: nn.Module, what: Masks | Temperature, renormalised: bool) -> Any:
    """A hook that routes anew by ``what``'s logits and returns what the host's router returns, in its convention."""

    def route(router: Any, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, weights, index = output
        logits = what.logits(router, args[0].reshape(-1, args[0].shape[-1]))
        probabilities = logits.softmax(-1)
        # Looked at on the router's own output, since versions of transformers differ.
        returns_logits = not torch.allclose(first.sum(-1), first.new_ones(()))
        weights, index = probabilities.topk(index.shape[-1], -1)
        if renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits if returns_logits else probabilities, weights, index

    return router.register_forward_hook(route)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("kind", [Masks, Temperature])
@pytest.mark.parametrize("folder", SOFTMAX)
def test_a_hook_that_routes_anew(
    folder: str, kind: Callable[[], Masks | Temperature], when: str, estimator: str
) -> None:
    what = kind()
    layer = Single(folder)
    renormalised = folder != "olmoe"
    if hasattr(layer.router, "norm_topk_prob"):
        renormalised = layer.router.norm_topk_prob
    formula = Formula(FORMULAS[folder].score, renormalised, logits=what.logits)
    if when == "before attaching":
        add_to(layer.router, what, renormalised)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        if when == "after the first step":
            assert_close(layer.train(*tokens(24)), layer.truth(*tokens(24), estimator))
        if when != "before attaching":
            add_to(layer.router, what, renormalised)
        add_to(router_of(layer.twin), what, renormalised)
        for seed in (1, 2):
            x, g = tokens(24, seed)
            assert_close(layer.train(x, g), layer.truth(x, g, estimator, formula))
            what.change()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", SOFTMAX)
def test_a_hook_that_comes_and_goes(folder: str, estimator: str) -> None:
    layer = Single(folder)
    renormalised = getattr(layer.router, "norm_topk_prob", True)
    x, g = tokens(24)
    what = Temperature()
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        expected = layer.truth(x, g, estimator)
        for _ in range(2):
            hook = add_to(layer.router, what, renormalised)
            changed = layer.train(x, g)
            hook.remove()
            assert_close(layer.train(x, g), expected)
    add_to(router_of(layer.twin), what, renormalised)
    assert_close(
        changed, layer.truth(x, g, estimator, Formula(FORMULAS[folder].score, renormalised, logits=what.logits))
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_sigmoid_router_with_a_hook_on_its_logits(estimator: str) -> None:
    """LFM2-MoE and DeepSeek-V3 route outside of their routers in older versions of transformers."""
    layer = Single("lfm2_moe")
    what = Temperature()

    def add(block: Any) -> None:
        def route(router: Any, args: tuple[Tensor, ...], output: Any) -> Any:
            logits = what.logits(router, args[0])
            if isinstance(output, Tensor):
                return logits
            weights, index = logits.sigmoid().topk(3, -1)
            return logits, weights / (weights.sum(-1, keepdim=True) + 1e-6), index

        block.gate.register_forward_hook(route)

    formula = dataclasses.replace(FORMULAS["lfm2_moe"], renormalised=True, scaling=1.0, logits=what.logits)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        layer.train(*tokens(24))
        for block in (layer.block, layer.twin):
            if getattr(block, "use_expert_bias", False):
                block.expert_bias.zero_()
        add(layer.block)
        add(layer.twin)
        for seed in (1, 2):
            x, g = tokens(24, seed)
            assert_close(layer.train(x, g), layer.truth(x, g, estimator, formula), 2e-5)
            what.change()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("when", ["before the first step", "after the first step"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("folder", ["qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3", "glm4_moe", "lfm2_moe"])
def test_norm_topk_prob_is_switched_after_attaching(folder: str, first: bool, when: str, estimator: str) -> None:
    layer = Single(folder, norm_topk_prob=first)

    def switch(block: Any) -> None:
        """The router's, or in older versions the block's."""
        owners = [owner for owner in (router_of(block), block) if hasattr(owner, "norm_topk_prob")]
        for owner in owners:
            owner.norm_topk_prob = not first

    def formula(renormalised: bool) -> Formula:
        return dataclasses.replace(FORMULAS[folder], renormalised=renormalised)

    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        if when == "after the first step":
            assert_close(layer.train(*tokens(24)), layer.truth(*tokens(24), estimator, formula(first)))
        switch(layer.block)
        switch(layer.twin)
        for seed in (1, 2):
            x, g = tokens(24, seed)
            assert_close(layer.train(x, g), layer.truth(x, g, estimator, formula(not first)), 2e-5)
