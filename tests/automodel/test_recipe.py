"""Automodel's own fine-tuning recipe, by the key in its YAML, see `recipe_on_ranks`."""

from __future__ import annotations

from typing import Any

import pytest
import scripts
from installs import is_installed

pytestmark = pytest.mark.skipif(is_installed("verl"), reason="the environment of verl has an older Automodel")

TOLERANCE = 1e-5
CELLS = (
    "own layers",
    "own layers, FSDP 2",
    "own layers, FSDP 2, checkpointing",
    "own layers, EP 2",
    "own layers, EP 2, checkpointing",
    "own layers, EP 2, checkpointing selective",
    "transformers' layers",
    "transformers' layers, FSDP 2",
    "own layers, FSDP 2 with EP 2",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recipe")
    return scripts.run("recipe_on_ranks.py", folder, report=folder / "report.json")


def test_every_cell_has_run(report: dict[str, Any]) -> None:
    assert set(report) == set(CELLS)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_the_oracle(report: dict[str, Any], cell: str) -> None:
    result = report[cell]
    assert result["error without"] <= TOLERANCE  # the host's own, by the same oracle
    assert result["error"] <= TOLERANCE
    assert result["difference"] > 0.1
    assert result["checkpointed"] == ("checkpointing" in cell)


@pytest.mark.parametrize("cell", CELLS)
def test_all_else_is_as_without(report: dict[str, Any], cell: str) -> None:
    result = report[cell]
    before, after = result["losses"]
    assert len(before) == 1
    assert before == after  # bit for bit
    assert result["saved"]["tensors"] > 0
    assert result["saved alike"]
    assert not result["ours in a configuration"]


def test_ranks_have_different_numbers_of_tokens(report: dict[str, Any]) -> None:
    assert len(set(report["own layers, EP 2"]["tokens"])) == 2
    assert len(set(report["own layers, FSDP 2 with EP 2"]["tokens"])) == 4
