"""The README's table of architectures is what `table.py` prints."""

from pathlib import Path

import table
import transformers

README = (Path(__file__).parents[2] / "README.md").read_text()
NEWEST = "5.23.0"


def test_the_readme_has_the_counts_and_the_table() -> None:
    outcomes = table.outcomes()
    assert f"\n{table.counts(outcomes)}\n" in README
    if transformers.__version__ == NEWEST:
        assert f"\n{table.table(outcomes)}\n" in README
