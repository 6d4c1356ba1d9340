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
    heads = next(row for row in rows if row[:2] == ["Layer", "Estimator"])
    trained = [row for row in rows if row[0].split()[0] in ("trained", "demo")]
    assert len(trained) == 2 * 7
    for budget, said in worth.MEASURED.items():
        column = heads.index(f"1/{round(1 / budget)}")
        for estimator, text in zip(worth.ESTIMATORS, said, strict=True):
            found = [float(row[column].split("→")[1]) for row in trained if row[1] == estimator]
            assert text == f"{min(found):.2f} to {max(found):.2f}"
