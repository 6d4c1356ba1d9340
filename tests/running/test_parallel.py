"""Transformers' own tensor and expert parallelism: in each layout the gradients are those of the dense oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import matrix
import matrix_table
import pytest
from installs import is_installed
from packaging.version import Version

pytestmark = pytest.mark.skipif(
    not is_installed("trl") or Version(matrix.installed()) < Version("5.23"),
    reason="needs trl, and the parallelism of transformers 5.23; run `nox -s transformers`",
)

REASONS = {
    "changed output": "their output isn't the sum of w_j·E_j(x) over the selected experts: it is 2 times that",
    "refused: pipeline parallelism": "transformers' pipeline parallelism (pp_size) has no backward",
    "refused: kernels of Mega MoE": "the kernels of DeepGEMM Mega MoE have no backward",
    "refused: a part of a model": "call apply_densemixer on the model that from_pretrained returned",
}


@functools.cache
def report() -> dict[str, Any]:
    return matrix.run("parallel")


def test_every_cell_has_run() -> None:
    assert set(report()) == set(matrix.parallel_cells())


@pytest.mark.parametrize("cell", matrix.parallel_cells())
def test_cell(cell: str) -> None:
    result = report()[cell]
    assert "failed" not in result, result["failed"]
    variation = cell.partition(": ")[2]
    if variation in REASONS:
        assert REASONS[variation] in result["refused"]
        return
    assert result["error"] <= result["allowed"]
    assert result["difference"] > 0.1  # else the cell could not tell DenseMixer from conventional training


def test_the_table_of_the_page_has_all_layouts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers-parallel.md").read_text()
    for row in matrix_table.parallel_rows():
        assert matrix_table.line(row[:3])[:-1] in page
