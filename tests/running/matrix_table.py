"""Print the matrix as tables: the worst error of each way of running, and that of each cell, in the last reports.

Then those of transformers' own parallelism, which docs/transformers-parallel.md has: its layouts, and what became of
each architecture (of the session `parallel_sweep`).

.venv/bin/nox -f ci/noxfile.py -s transformers -- tests/running
python tests/running/matrix_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import matrix

VERSIONS = ("5.5.4", "5.24.0")
SWEEP = {
    "exact": "exact",
    "elsewhere": "exact in the routers; of other parameters wrong, without DenseMixer too",
    "wrong": "wrong without DenseMixer too",
    "fails": "none: transformers can't load or run it there, without DenseMixer either",
    "no plan": "none: transformers has no plan for it",
    "refused": "refused, as in one process",
}
"""What may become of an architecture that transformers spreads over ranks."""


def rows() -> Iterator[tuple[str, ...]]:
    for ways in matrix.MATRIX.values():
        for way, variations in ways.items():
            if way != "refused":
                yield way, ", ".join(variations), *(worst(f"{way}: ", version) for version in VERSIONS)


def cell_rows() -> Iterator[tuple[str, ...]]:
    for ways in matrix.MATRIX.values():
        for way, variations in ways.items():
            for variation in variations if way != "refused" else ():
                yield way, variation, *(worst(f"{way}: {variation}", version, exactly=True) for version in VERSIONS)


def parallel_rows() -> Iterator[tuple[str, ...]]:
    for way, (layout, variations) in matrix.PARALLEL.items():
        shown = [variation for variation in variations if not variation.startswith(matrix.NO_GRADIENTS)]
        yield way, str(matrix.processes(layout)), ", ".join(shown), parallel_worst(way, shown)


def parallel_worst(way: str, variations: Sequence[str]) -> str:
    """The largest error of the gradients."""
    report = matrix.report_of("parallel", VERSIONS[-1])
    if not report.exists():
        return "–"
    found = json.loads(report.read_text())
    results = [found.get(f"{way}: {variation}", {}) for variation in variations]
    if any("error" not in result for result in results):
        return "failed"
    return f"{max(result['error'] for result in results):.1e}"


def sweep_rows(found: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    for kind, text in SWEEP.items():
        cells = ([name for name, ways in found.items() if ways[way]["kind"] == kind] for way in ("EP", "TP"))
        yield text, *(f"{len(names)}: {', '.join(names)}" if names else "none" for names in cells)


def worst(name: str, version: str, exactly: bool = False) -> str:
    """The largest error of the cells with this name or, if not exactly, whose names start with it.

    In half precision, with what was allowed.
    """
    found = [
        result
        for report in matrix.REPORTS.glob(f"{version}-*.json")
        for cell, result in json.loads(report.read_text()).items()
        if (cell == name if exactly else cell.startswith(name))
    ]
    if not found:
        return "–"
    if any("error" not in result for result in found):
        return "failed"
    result = max(found, key=lambda result: result["error"] / result["allowed"])
    exact = result["allowed"] == 1e-5
    return f"{result['error']:.1e}" if exact else f"{result['error']:.4f} ≤ {result['allowed']:.4f}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def print_table(second: str, rows: Iterator[tuple[str, ...]]) -> None:
    print(line(["Way", second, *(f"transformers {version}" for version in VERSIONS)]))
    print("|---|---|---|---|")
    for row in rows:
        print(line(row))


def main() -> None:
    print_table("Variations", rows())
    print("\n<details markdown><summary>Each cell</summary>\n")
    print_table("Variation", cell_rows())
    print("\n</details>\n")
    print(line(["Layout", "Ranks", "Variations", "Worst error"]))
    print("|---|---|---|---|")
    for row in parallel_rows():
        print(line(row))
    sweep = matrix.report_of("parallel_sweep", VERSIONS[-1])
    if sweep.exists():
        print()
        print(line(["Gradients", "EP (FSDP 2 · EP 2)", "TP (TP 2)"]))
        print("|---|---|---|")
        for row in sweep_rows(json.loads(sweep.read_text())):
            print(line(row))


if __name__ == "__main__":
    main()
