"""Each architecture that transformers can spread over ranks: the routers' gradients are those of one process.

It takes minutes, so it is a session of its own: `nox -s parallel_sweep`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matrix
import matrix_table
import pytest
import ranks

pytestmark = pytest.mark.skipif("PARALLEL_SWEEP" not in os.environ, reason="takes minutes; run `nox -s parallel_sweep`")

PAGE = Path(__file__).parents[2] / "docs" / "transformers-parallel.md"
ALLOWED = 2e-5
WAYS = ("EP", "TP")


@functools.cache
def report() -> dict[str, Any]:
    found = matrix.report_of("parallel_sweep", matrix.installed())
    found.parent.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, str(matrix.HERE / "parallel_sweep.py"), str(found)]
    done = subprocess.run(script, env=ranks.environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(found.read_text())


@pytest.mark.parametrize("way", WAYS)
def test_routers_are_exact_wherever_transformers_is(way: str) -> None:
    errors = {name: ways[way]["error"] for name, ways in report().items() if ways[way]["error"] is not None}
    assert len(errors) > 50
    assert {name: error for name, error in errors.items() if error > ALLOWED} == {}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_refused_is_refused_in_one_process_too(way: str) -> None:
    for name, ways in report().items():
        assert ways[way]["kind"] != "refused" or "DenseMixer can't train it" in ways[way]["more"], name


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text()
    for row in matrix_table.sweep_rows(report()):
        assert f"\n{matrix_table.line(row)}\n" in page
