"""Print the matrix as a table: the worst error of each way of running, from the reports of the last tests.

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
                yield way, ", ".join(variations), *(worst(way, version) for version in VERSIONS)


def worst(way: str, version: str) -> str:
    """The largest error of a way's variations; of those in half precision with what was allowed."""
    found = [
        result
        for report in matrix.REPORTS.glob(f"{version}-*.json")
        for cell, result in json.loads(report.read_text()).items()
        if cell.startswith(f"{way}: ")
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


def main() -> None:
    print(line(["Way", "Variations", *(f"transformers {version}" for version in VERSIONS)]))
    print("|---|---|---|---|")
    for row in rows():
        print(line(row))


if __name__ == "__main__":
    main()
