"""Automodel's own layer on two and four processes, see `layers_on_ranks`."""

from __future__ import annotations

from typing import Any

import pytest
import scripts

TOLERANCE = 1e-5
CELLS = (
    "EP 2",
    "EP 2, centered",
    "EP 2, grouped product, padding",
    "EP 2, nothing but padding on a rank",
    "EP 2, gpt-oss",
    "EP 2, sigmoid, groups, a bias",
    "EP 2, latent",
    "EP 2, auxiliary loss",
    "EP 2, DeepEP",
    "EP 2, DeepEP, gpt-oss",
    "FSDP, experts and gate units",
    "FSDP, experts and gate units, attached before",
    "FSDP, the layer a unit",
    "EP 2 on four",
    "EP 4",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ranks") / "report.json"
    return scripts.run("layers_on_ranks.py", path, report=path)


def test_every_cell_has_run(report: dict[str, Any]) -> None:
    assert set(report) == {*CELLS, "budget"}


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_the_oracle(report: dict[str, Any], cell: str) -> None:
    result = report[cell]
    assert "refused" not in result, result
    assert result["error without"] <= TOLERANCE  # the host's own, by the same oracle
    assert result["error"] <= TOLERANCE
    assert result["difference"] > 0.1
    assert result["bitwise"]


def test_a_budget_is_exact_in_the_mean(report: dict[str, Any]) -> None:
    assert 0 < report["budget"]["off"] < 3
    assert report["budget"]["spread"] < 0.1  # else it would say nothing
