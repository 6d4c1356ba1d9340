"""Ways of running: in each, the gradients are those of the dense oracle, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import matrix_table
import pytest
from installs import is_installed
from ranks import once

CELLS = [(script, cell) for script in matrix.MATRIX for cell in matrix.cells(script, matrix.installed())]
NEEDED = ("deepspeed", "trl", "liger-kernel", "triton")

pytestmark = pytest.mark.skipif(
    not all(map(is_installed, NEEDED)), reason=f"needs {', '.join(NEEDED)}; run `nox -s transformers`"
)


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """What a script found in the cells that the tests of this session ask for."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params for item in here if isinstance(item, pytest.Function) and hasattr(item, "callspec")]

    @once
    def run(script: str) -> dict[str, Any]:
        names = [one.get("cell") for one in asked if one.get("script") == script]
        return matrix.run(script, () if None in names else dict.fromkeys(names))

    return run


def each(way: str = "") -> pytest.MarkDecorator:
    """The cells of a way of running, or of all of them."""
    wanted = [pytest.param(script, cell, id=cell) for script, cell in CELLS if cell.startswith(way)]
    return pytest.mark.parametrize(("script", "cell"), wanted)


@pytest.mark.parametrize("script", matrix.MATRIX)
def test_every_cell_has_run(report: Any, script: str) -> None:
    assert set(report(script)) == set(matrix.cells(script, matrix.installed()))


@each()
def test_cell(report: Any, script: str, cell: str) -> None:
    result = report(script)[cell]
    assert "failed" not in result, result["failed"]
    if cell.startswith("refused: "):
        assert "the tensor and expert parallelism of transformers" in result["refused"]
        return
    assert result["error"] <= result["allowed"]
    assert result["difference"] > 0.1  # else the cell could not tell DenseMixer from conventional training


@each("torch.compile: ")
def test_compiles_once(report: Any, script: str, cell: str) -> None:
    """Graphs after each of five steps: the first one checks the routing, so there may be a second set, then none."""
    first, second, *later = report(script)[cell]["more"]["graphs"]
    assert later == [second] * 3
    if cell.endswith(("fullgraph after a step without", "inductor by layers")):
        assert first == second


@each("Liger: ")
def test_the_fused_kernel_computes_in_the_interpreter(report: Any, script: str, cell: str) -> None:
    assert report(script)[cell]["more"]["fused"] == ["fused kernel"]


@each("DPOTrainer: ")
def test_the_reference_model_of_dpo_is_left_alone(report: Any, script: str, cell: str) -> None:
    assert report(script)[cell]["more"]["reference"] == {"changed": [], "gradients": [], "hooks": []}


@pytest.mark.parametrize(
    ("script", "cell", "lost"),
    [("two_ranks", "ZeRO-3: plain", False), ("two_ranks", "ZeRO-3: without leaf modules", True)],
)
def test_leaf_modules_keep_the_order_of_modules(report: Any, script: str, cell: str, lost: bool) -> None:
    """Else ZeRO-3 can't prefetch."""
    assert (report(script)[cell]["more"]["out of order"] > 0) == lost


def test_the_tables_of_the_page_have_all_ways_and_cells() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ways-of-running.md").read_text()
    for row in [*matrix_table.rows(), *matrix_table.cell_rows()]:
        assert matrix_table.line(row[:2])[:-1] in page


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "REPORTS", tmp_path)
    cell = {"error": 2e-6, "allowed": 1e-5, "difference": 1.0}
    (tmp_path / "9.0-liger.json").write_text(json.dumps({"Liger: a": cell, "Liger: b": {**cell, "error": 3e-6}}))
    assert matrix_table.worst("Liger: ", "9.0") == "3.0e-06"
    assert matrix_table.worst("Liger: a", "9.0", exactly=True) == "2.0e-06"
    assert matrix_table.worst("DDP: ", "9.0") == "–"
