"""Threads that run one model at a time: each must get what it would get alone.

They meet between the router and the experts of a layer, so that every pass of one is in the middle of one of the other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from blocks import replica
from families import FAMILIES
from families import tokens as ids
from oracle import assert_close
from runs import gradients as model_gradients
from runs import selections
from single import Single, run, tokens
from torch import Tensor, nn

from densemixer_adapters.metrics.gradients import RouterMeter
from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

FOLDERS = ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "lfm2_moe"]
STEPS = 5


@contextlib.contextmanager
def meeting(blocks: list[Any], threads: int) -> Iterator[threading.Barrier]:
    """All threads wait for each other whenever they reach the experts of one of the blocks."""
    barrier = threading.Barrier(threads)

    def wait(module: nn.Module, args: Any) -> None:
        barrier.wait(timeout=60)

    hooks = [block.experts.register_forward_pre_hook(wait) for block in blocks]
    try:
        yield barrier
    finally:
        for hook in hooks:
            hook.remove()


def at_once(barrier: threading.Barrier, *work: Callable[[], Any]) -> list[Any]:
    """The results of functions that run in a thread each; the first error is raised here, and ends them all."""
    errors = []

    def run_one(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    with ThreadPoolExecutor(len(work)) as pool:
        results = list(pool.map(run_one, work))
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_two_threads_that_train(folder: str, estimator: str, watched: bool) -> None:
    layer = Single(folder)

    def work(thread: int) -> list[dict[str, Tensor]]:
        return [layer.train(*tokens(24, seed=10 * thread + step)) for step in range(STEPS)]

    with apply_densemixer(layer.model, DenseMixerConfig(estimator)) as handle, meeting([layer.block], 2) as barrier:
        if watched:
            RouterMeter(handle.layers, load=True)
        found = at_once(barrier, lambda: work(1), lambda: work(2))
    for thread, steps in enumerate(found, 1):
        for step, ours in enumerate(steps):
            assert_close(ours, layer.truth(*tokens(24, seed=10 * thread + step), estimator))


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_replicas_as_in_data_parallel(folder: str, estimator: str) -> None:
    layer = Single(folder)
    parameters = dict(layer.block.named_parameters())

    def work(seed: int) -> dict[str, Tensor]:
        x, g = tokens(24, seed)
        x.requires_grad_()
        wanted = {"input": x, **parameters}
        found = torch.autograd.grad(run(replica(layer.block), x), list(wanted.values()), g)
        return dict(zip(wanted, found, strict=True))

    with apply_densemixer(layer.model, DenseMixerConfig(estimator)), meeting([layer.block], 3) as barrier:
        found = at_once(barrier, *(lambda seed=seed: work(seed) for seed in range(3)))
    for seed, ours in enumerate(found):
        assert_close(ours, layer.truth(*tokens(24, seed), estimator))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_thread_that_evaluates_beside_one_that_trains(folder: str) -> None:
    layer = Single(folder)

    def evaluate() -> list[Tensor]:
        with torch.no_grad():
            return [run(layer.block, tokens(17, seed)[0]) for seed in range(STEPS)]

    def train() -> list[dict[str, Tensor]]:
        return [layer.train(*tokens(24, seed)) for seed in range(STEPS)]

    alone = evaluate()
    with apply_densemixer(layer.model), meeting([layer.block], 2) as barrier:
        outputs, found = at_once(barrier, evaluate, train)
    for output, expected in zip(outputs, alone, strict=True):
        assert torch.equal(output, expected)
    for seed, ours in enumerate(found):
        assert_close(ours, layer.truth(*tokens(24, seed), "densemixer"))


@pytest.mark.parametrize("evaluates", ["a forward", "measure"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_metrics_with_a_thread_that_evaluates(name: str, evaluates: str) -> None:
    """What a thread without gradients runs is in nobody's metrics but in those that it asked for itself."""
    family = FAMILIES[name]
    model: Any = family.build("eager")
    with apply_densemixer(model) as handle:
        metrics = RouterMetrics(handle.layers, model)
        model_gradients(model)  # the batch that `measure` runs again is from here
        expected = metrics.measure()
        other = ids(seed=5)

        def evaluate() -> dict[str, float]:
            if evaluates == "measure":
                return metrics.measure()
            with torch.no_grad():
                model(input_ids=other)
            return {}

        with meeting(family.blocks(model), 2) as barrier:
            measured, ours = at_once(barrier, evaluate, lambda: model_gradients(model))
        after = metrics.measure()
    routing = {key for key in expected if key.endswith(("routing_change", "logit_drift"))}
    assert len(routing) == 6
    assert {key: (measured or after)[key] for key in routing} == dict.fromkeys(routing, 0.0)
    if not measured:
        for key in expected:
            assert after[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    with selections(family, model) as indices:
        model_gradients(model)
    truth = model_gradients(family.oracle(model, indices, "densemixer"))
    assert_close(ours, truth, 1e-4)
