"""Experts spread over ranks, with tokens of their own or shared, by number or by width."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from ranks import once, run_script
from spread import COUNTED, SAMPLED, WAYS


@once
def report() -> dict[str, Any]:
    """What each rank found, by way."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = run_script(Path(__file__).with_name("spread.py"), Path(folder) / "report.json")
        return found


def found(way: str) -> list[dict[str, Any]]:
    """On each rank."""
    for result in report()[way]:
        assert "failed" not in result, result["failed"]
    return report()[way]


@pytest.mark.parametrize("way", WAYS)
def test_inner_products_and_output(way: str) -> None:
    for result in found(way):
        assert result["error"] <= 2e-6
        assert result["in pieces"] <= 2e-6
        assert result["output"] <= 2e-6
        assert result.get("alike", True)


@pytest.mark.parametrize("way", SAMPLED)
def test_a_budget_is_exact_in_the_mean(way: str) -> None:
    for result in found(way):
        assert result["bias"] < 5  # the largest of some 100 normal variables over all ways
        assert result["draw"] > 3 * result["mean"]


@pytest.mark.parametrize("budget", [1.0, 0.5])
@pytest.mark.parametrize("way", COUNTED)
def test_operations_and_bytes_are_those_of_the_formula(way: str, budget: float) -> None:
    for result in found(way):
        counted = result[f"counted at {budget}"]
        assert counted["sent"] == counted["sent by formula"]
        # Whole pairs on each rank.
        assert counted["operations"] == pytest.approx(counted["operations by formula"], rel=0 if budget == 1 else 0.1)
