"""The table of architectures on the pages is what `table.py` prints."""

import table
import transformers
from pages import REPOSITORY

README, MODELS = ((REPOSITORY / page).read_text() for page in ("README.md", "docs/models.md"))
NEWEST = "5.24.0"


def test_the_pages_have_the_counts_and_the_table() -> None:
    outcomes = table.outcomes()
    assert f"\n{table.counts(outcomes)}\n" in README
    assert f"\n{table.counts(outcomes)}\n" in MODELS
    if transformers.__version__ == NEWEST:
        assert f"\n{table.table(outcomes)}\n" in MODELS
