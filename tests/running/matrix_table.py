"""Print the matrix as tables: the worst error of each way of running, and that of each cell, in the last reports.

Then that of transformers' own parallelism, which docs/transformers-parallel.md has.

.venv/bin/nox -f ci/noxfile.py -s transformers -- tests/running
python tests/running/matrix_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import matrix

VERSIONS = ("5.5.4", "5.23.0")


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


if __name__ == "__main__":
    main()
