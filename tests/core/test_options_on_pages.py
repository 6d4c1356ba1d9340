"""What the pages say about options and estimators is what the code says."""

import dataclasses
import re

import pytest
from pages import REPOSITORY

from densemixer_core import DenseMixerConfig
from densemixer_core.estimators import ESTIMATORS


def rows(page: str) -> dict[str, str]:
    """The first two cells of a page's tables."""
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", (REPOSITORY / page).read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "docs/options.md"])
def test_every_option_and_its_default_is_in_the_table(page: str) -> None:
    defaults = {field.name: f"`{field.default!r}`".replace("'", '"') for field in dataclasses.fields(DenseMixerConfig)}
    assert rows(page) == defaults


def test_every_estimator_is_in_the_table() -> None:
    assert rows("docs/method.md").keys() == set(ESTIMATORS)
