"""``densemixer selftest`` is red where a budget, or what a layer hands to it, is wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import failed, plant, selftest_here

from densemixer_adapters import expert_parallel
from densemixer_adapters.selftest import gradients, spread
from densemixer_core import sampled

layer = importlib.import_module("densemixer_core.straight_through")  # in the package, the function has that name

FLOAT32, HALVES = "products: float32", ("products: bfloat16", "products: float16")
DRAWN, GPT_OSS = "[out, in], all pairs drawn", "[in, out] with biases, all pairs drawn"
EACH = {f"{dtype}, {layout}" for dtype in (FLOAT32, *HALVES) for layout in (DRAWN, GPT_OSS)}
OF_GPT_OSS = {case for case in EACH if case.endswith(GPT_OSS)}
MEAN = "products: budget 1/8, mean of 64 draws"

Fault = tuple[Callable[..., Any], str, str]
PRODUCTS: dict[str, tuple[Fault, set[str]]] = {
    "control isn't taken away": (
        (sampled.sampled_dots, "evaluator.dots(pairs) - dots.view(-1)[pairs.place]", "evaluator.dots(pairs)"),
        {*EACH, MEAN},
    ),
    "parts": ((sampled._Evaluator._split, "start += len(place)", "start += 0"), {*EACH}),
    "bias": ((sampled._grouped_affine, "output if bias is None else output + bias", "output"), OF_GPT_OSS),
    "[in, out]": (
        (
            sampled._Evaluator.__init__,
            "down.to(x.dtype)",
            "(down.flip(1) if experts.layout.transposed else down).to(x.dtype)",
        ),
        OF_GPT_OSS,
    ),
    "scale": ((sampled._Evaluator.__init__, "if scale is None else", "if True else"), OF_GPT_OSS),
    "half precision": (
        (
            sampled._grouped_product,
            "    if _is_taken(x)",
            "    weight = weight if x.dtype == torch.float32 else weight * 2\n    if _is_taken(x)",
        ),
        {case for case in EACH if case.startswith(HALVES)},
    ),
}
CENTERED = "gradients: eager, float32, centered, all pairs drawn"
LAYER: dict[str, tuple[Fault, set[str]]] = {
    "half of the experts are never drawn": (
        (layer._extra_gradient, "(-1, index, 0.0)\n", "(-1, index, 0.0)\n        sensitivity[:, ::2] = 0\n"),
        {CENTERED, "gradients: eager, float32, densemixer, all pairs drawn"},
    ),
    "sign of the mean": ((layer._extra_gradient, "mean = _mean_of", "mean = -_mean_of"), {CENTERED}),
    "y": ((layer.straight_through, "output.detach().clone() if", "output.detach().clone().zero_() if"), {CENTERED}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, cases = PRODUCTS[name]
    plant(monkeypatch, *fault)
    status, outcomes = selftest_here("products")
    assert status == 1
    assert {*failed(outcomes)} == cases


@pytest.mark.parametrize("name", LAYER)
def test_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, cases = LAYER[name]
    plant(monkeypatch, *fault)
    monkeypatch.setattr(gradients, "implementations", lambda: ["eager"])
    monkeypatch.setattr(gradients, "DTYPES", (torch.float32,))
    status, outcomes = selftest_here("gradients")
    assert status == 1
    assert {*failed(outcomes)} == {*cases, "gradients: eager, float32, centered, budget 1/8, mean of 32 draws"}


def test_expert_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this one process, where no other would have the fault."""
    plant(monkeypatch, expert_parallel.gathered_dots, "known, drawn, seed", "known, drawn // 2, seed")
    monkeypatch.setattr(spread, "spawn", lambda function, args, ranks: function(0, *args))
    threads = torch.get_num_threads()
    try:
        exact, drawn = spread._run(tmp_path / "one", 1, "gloo", "cpu")
    finally:
        torch.set_num_threads(threads)
    assert (exact.state, drawn.state) == ("ok", "failed")
