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

PAGE = Path(__file__).parents[2] / "docs" / "transformers-parallel.md"
REASONS = {
    "changed output": "their output isn't the sum of w_j·E_j(x) over the selected experts: it is 2 times that",
    "refused: pipeline parallelism": "transformers' pipeline parallelism (pp_size) has no backward",
    "refused: kernels of Mega MoE": "the kernels of DeepGEMM Mega MoE have no backward",
    "refused: a part of a model": "call apply_densemixer on the model that from_pretrained returned",
    "PEFT's error: experts": "aten.baddbmm.default got mixed torch.Tensor and DTensor",
    "PEFT's error: down_proj of experts": "'Qwen3MoeExperts' object has no attribute 'weight'",
    "PEFT's error: attention": "is invalid for input of size",
    "PEFT's error: o_proj": "is invalid for input of size",
    "PEFT's error: routers in full": "Attempted to call copy_() on an invalid python storage",
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


@pytest.mark.parametrize("cell", [cell for cell in matrix.parallel_cells() if cell.endswith("torch.compile")])
def test_compiles_once(cell: str) -> None:
    first, *later = report()[cell]["more"]["graphs"]
    assert later == [first] * 2
    assert first == 1 if cell.startswith("TP 2: ") else first > 1  # EP's dispatch breaks it


@pytest.mark.parametrize("cell", [cell for cell in matrix.parallel_cells() if cell.endswith("saved checkpoints")])
def test_each_rank_has_saved_its_part(cell: str) -> None:
    files = report()[cell]["more"]["files"]
    ranks = matrix.processes(matrix.PARALLEL[cell.partition(":")[0]][0])
    assert "whole/model.safetensors" in files
    assert sum(file.startswith("parts/shard-") for file in files) == ranks


def test_the_page_has_the_errors_of_peft() -> None:
    page = " ".join(PAGE.read_text().split())
    for variation, said in REASONS.items():
        assert said in page or not variation.startswith("PEFT's error"), said


def test_the_table_of_the_page_has_all_layouts() -> None:
    page = PAGE.read_text()
    for row in matrix_table.parallel_rows():
        assert matrix_table.line(row[:3])[:-1] in page
