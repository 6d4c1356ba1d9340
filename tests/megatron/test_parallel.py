"""Experts and tokens spread over two and four processes, against the oracle with all of them in one."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import oracle
import torch
from cases import has
from layouts import LAYOUTS, TRAININGS, Layout, Training, cells, train
from ranks import once, run_script
from small_models import DEAD

CELLS = [(layout, cell) for layout in LAYOUTS for cell in cells(LAYOUTS[layout])]
BUDGET, METRICS, CHANGED = "budget", "metrics", "changed experts"
GRADIENTS = [each for each in CELLS if not each[1].startswith((BUDGET, METRICS, CHANGED))]


@once
def report() -> dict[str, Any]:
    """What each rank found, by layout and cell."""
    with tempfile.TemporaryDirectory() as folder:
        everything: dict[str, Any] = run_script(Path(__file__).with_name("layouts.py"), Path(folder) / "report.json")
        return everything


def found(layout: str, cell: str) -> list[Any]:
    """On each rank."""
    ranks: list[Any] = report()[f"{layout}: {cell}"]
    for result in ranks:
        assert "failed" not in result, result["failed"]
    return ranks


@pytest.mark.parametrize(("layout", "cell"), GRADIENTS)
def test_gradients(layout: str, cell: str) -> None:
    for result in found(layout, cell):
        if cell == "gathered in parts":
            assert max(result.values()) <= 1e-6, result
            continue
        assert all(error <= result["allowed"][what] for what, error in result["errors"].items()), result
        assert result["difference"] > 0.1, result
        assert result["same_output"], result
        assert result["same_experts"], result
        assert result["same_measured"], result
        assert result["norm"] < 1e-5, result


@pytest.mark.parametrize("layout", [layout for layout, cell in CELLS if cell == BUDGET])
def test_a_budget(layout: str) -> None:
    """The mean over draws is the exact gradient, whichever rank holds the experts, or parts of them."""
    for result in found(layout, BUDGET):
        assert result["output"] == 0, result
        assert result["mean"] < 2, result
        assert result["spread"] > 0.1, result  # one draw is no more than an estimate
        assert result["bias"] < 5, result  # the largest of some 200 normal variables over all cells


@pytest.mark.parametrize("layout", [layout for layout, cell in CELLS if cell == CHANGED])
def test_experts_that_compute_something_else_are_refused(layout: str) -> None:
    for refusals in found(layout, CHANGED):
        assert len(refusals) > 8
        for change, message in refusals.items():
            assert message is not None, change
            assert "Mixture-of-Experts layer 1, experts (" in message
    for before, after, changed in found(layout, f"{CHANGED}, some without tokens"):
        assert (before, after) == (None, None)
        assert changed is not None


def test_experts_of_one_rank_that_compute_something_else_are_refused_there() -> None:
    (first,), (second,) = found("DP2", f"{CHANGED} of one rank")
    assert first is not None
    assert second is None


@pytest.mark.parametrize(("layout", "cell"), [each for each in CELLS if METRICS in each[1]])
def test_router_metrics(layout: str, cell: str) -> None:
    for result in found(layout, cell):
        exact = result["exact"]
        assert 0.01 < exact["router_grad_share_unselected"] < 0.99
        names = {f"densemixer/{place}{name}": value for name, value in exact.items() for place in ("", "layer_0/")}
        assert result["found"] == pytest.approx(names, rel=1e-5)


@functools.cache
def alone(options: str) -> dict[str, Any]:
    """What one process finds for a model with these options."""
    return train(Training(Layout(1), json.loads(options)))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_model_trains_as_in_one_process(name: str) -> None:
    """Its layers, experts, sequences and tokens are spread over ranks, through Megatron's own schedules and DDP."""
    way = TRAININGS[name]
    if not has(way.since):
        pytest.skip(f"Megatron Core has it since {way.since}")
    exact = alone(json.dumps(way.model))
    ranks = found(f"training, {name}", "")
    assert set(exact["weights"]) == {layer for result in ranks for layer in result["weights"]}
    assert any(result["losses"] for result in ranks)
    if "without DenseMixer" not in name:
        assert_metrics_are_of(exact, way.untaught)
    for result in ranks:
        if not way.distributed:  # a distributed optimizer leaves a rank with the gradients of its part alone
            for layer, gradient in result["gradients"].items():
                error = oracle.worst_error(torch.tensor(gradient), torch.tensor(exact["gradients"][layer]))
                assert error <= 1e-5, (layer, error)
                taught = torch.tensor(gradient)[DEAD:].norm(dim=-1) > 1e-4
                assert (~taught).all() if layer in way.untaught else taught.all(), layer
        for layer, weights in result["weights"].items():
            assert torch.allclose(torch.tensor(weights), torch.tensor(exact["weights"][layer]), atol=1e-4)
        assert not result["losses"] or result["losses"] == pytest.approx(exact["losses"], rel=1e-4)
        assert_same_metrics(result["metrics"], exact["metrics"])


def assert_metrics_are_of(exact: dict[str, Any], untaught: tuple[str, ...]) -> None:
    """In the first step, those of one process are those of Megatron's own gradients."""
    metrics = exact["metrics"][0]
    numbers = [name for name in exact["gradients"] if name not in untaught]
    places = [f"mtp_layer_{name.split('.')[2]}" if "." in name else f"layer_{int(name) - 1}" for name in numbers]
    norms = {place: torch.tensor(exact["gradients"][name]).norm() for place, name in zip(places, numbers, strict=True)}
    assert {name.split("/")[1] for name in metrics if name.count("/") == 2} == set(norms)
    for place, norm in norms.items():
        assert metrics[f"densemixer/{place}/router_grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    whole = torch.stack(list(norms.values())).norm().item()
    assert metrics["densemixer/router_grad_norm"] == pytest.approx(whole, rel=1e-4)


def assert_same_metrics(rows: list[dict[str, float]], exact: list[dict[str, float]]) -> None:
    """Of all steps. Later ones are those of weights that rounding has moved a little apart."""
    for step, (row, alone_row) in enumerate(zip(rows, exact, strict=True)):
        assert row == pytest.approx(alone_row, rel=1e-4 if step == 0 else 0.05), step
