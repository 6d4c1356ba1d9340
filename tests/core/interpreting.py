"""What the tests in Triton's interpreter share: layers, and ways that count their calls or are the fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import Case, Layer
from torch import Tensor

from densemixer_core import Activation, StackedExperts, expert_dots
from densemixer_core.kernel import at_once, fused, trial, triton_kernel, ways

FORMULAS = {
    "concatenated": Activation("silu", "concatenated"),
    "interleaved": Activation("gelu", "interleaved", offset=1.0),
    "clamped": Activation("silu", "interleaved", alpha=1.702, limit=2.0, offset=1.0),
    "ungated": Activation("relu"),
    "ungated, squared": Activation("relu2"),
    "ungated, tanh": Activation("gelu_tanh"),
}
# Three tiles of tokens, in two groups, and two of columns and of the hidden dimension; none of them full.
RAGGED = Case(tokens=37, hidden=20, ffn=18, experts=2, k=1)


TRIAL = trial.trial_tokens(1)
ELSEWHERE = {"fused kernel": triton_kernel, "all at once": at_once}
"""The ways other than the products one by one."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The number of tokens of each call of a way, by its name."""
    seen: dict[str, list[int]] = {name: [] for name in ELSEWHERE}

    def count(name: str, module: Any) -> None:
        launch = module.launch

        def counted(x: Tensor, *rest: object) -> Tensor:
            seen[name].append(len(x))
            return launch(x, *rest)

        monkeypatch.setattr(module, "launch", counted)

    for name, module in ELSEWHERE.items():
        count(name, module)
    monkeypatch.setattr(fused, "_chosen", {})
    return seen


@pytest.fixture
def be_fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has a way be the fastest of all: the interpreter's own times mean nothing."""

    def set_times(fastest: str) -> None:
        monkeypatch.setattr(ways, "_milliseconds", lambda name, run: 1.0 if name == fastest else 2.0)

    return set_times


def make(case: Case, dtype: torch.dtype = torch.float32) -> Layer:
    layer = Layer(case, dtype)
    layer.layout = dataclasses.replace(layer.layout, formula=FORMULAS[case.activation])
    return layer


@torch.no_grad()
def both(layer: Layer, dtype: torch.dtype | None = None, workspace: int = 1 << 28) -> tuple[Tensor, Tensor]:
    """By the chosen way and by the products one by one."""
    known, unknown = layer.layout, dataclasses.replace(layer.layout, formula=None)
    chosen, products = (
        expert_dots(layer.x, layer.g, StackedExperts(layer.weights, layout), dtype, workspace)
        for layout in (known, unknown)
    )
    return chosen, products
