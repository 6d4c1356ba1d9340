"""What `densemixer cost` says that a budget is worth is what stands in the table of `docs/budget.md`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_range_of_the_trained_layers() -> None:
    file = ROOT / "adapters" / "densemixer_adapters" / "cli" / "worth.py"
    spec = importlib.util.spec_from_file_location("worth", file)
    assert spec is not None
    assert spec.loader is not None
    worth = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worth)

    lines = (ROOT / "docs" / "budget.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    heads = next(row for row in rows if row[:2] == ["Estimator", "1/8"])
    ranges = {row[0]: row for row in rows if row[0] in worth.ESTIMATORS}
    means = [row for row in rows if row[0].split()[0] in ("trained", "demo")]
    assert len(means) == 2 * 7
    for budget, said in worth.MEASURED.items():
        column = heads.index(f"1/{round(1 / budget)}")
        for estimator, text in zip(worth.ESTIMATORS, said, strict=True):
            assert text == ranges[estimator][column]
            least, greatest = map(float, text.split(" to "))
            for row in means:
                if row[1] == estimator:
                    assert least <= float(row[column + 1].split("→")[1]) <= greatest
