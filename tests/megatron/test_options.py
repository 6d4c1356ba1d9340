"""docs/megatron-options.md against Megatron Core, against what is refused, and against what is tested."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import megatron.core
from cases import CASES, SPREAD_CASES
from layouts import TRAININGS
from megatron.core.transformer.transformer_config import MLATransformerConfig
from moe_layer import config

from densemixer_adapters.megatron import FLAG
from densemixer_adapters.megatron.refuse import REFUSED

PAGE = (Path(__file__).parents[2] / "docs" / "megatron-options.md").read_text(encoding="utf-8")
VERSIONS = ("0.16.1", "0.19.2")
"""In the order of the page's columns."""


class Row(NamedTuple):
    versions: set[str]
    state: str
    remark: str


def rows() -> dict[str, Row]:
    found = {}
    for line in PAGE.splitlines():
        if line.startswith("| `moe_"):
            option, *marks, state, remark = (cell.strip() for cell in line.strip("|").split("|"))
            held = {version for version, mark in zip(VERSIONS, marks, strict=True) if mark}
            found[option.strip("`")] = Row(held, state, remark)
    return found


ROWS = rows()
OPTIONS = {field.name: field for field in dataclasses.fields(MLATransformerConfig) if field.name.startswith("moe_")}
del OPTIONS[FLAG]


def test_every_option_of_this_version_is_on_the_page() -> None:
    unknown = sorted(OPTIONS.keys() - ROWS.keys())
    assert not unknown, (
        f"docs/megatron-options.md lacks options of Megatron Core {megatron.core.__version__}: {unknown}. See what "
        "each does to the router's logits and selection, the dispatch, the experts and where their weights are; test "
        "it in tests/megatron/cases.py or refuse it in adapters/densemixer_adapters/megatron/refuse.py, and add a row."
    )


@pytest.mark.skipif(megatron.core.__version__ not in VERSIONS, reason="a version without a column")
def test_the_columns_of_versions() -> None:
    assert {option for option, row in ROWS.items() if megatron.core.__version__ in row.versions} == OPTIONS.keys()


@pytest.mark.parametrize("option", ROWS)
def test_what_is_said_of_an_option(option: str) -> None:
    state, remark = ROWS[option].state, ROWS[option].remark
    if state == "refused":  # itself, or by what it needs
        assert option in REFUSED or set(re.findall(r"`(\w+)`", remark)) & REFUSED.keys()
    else:
        assert state in ("tested", "no effect")
        assert option not in REFUSED


def test_each_option_that_is_said_to_be_tested_is() -> None:
    """A case or a training, of those that this version has, names it, or makes it something else than its default."""
    cases = [case for case in (CASES | SPREAD_CASES).values() if case.exists]
    named = {option for case in cases for option in case.options}
    named |= {option for way in TRAININGS.values() for option in way.model}
    layer = vars(config(CASES["softmax after top-k"]))
    changed = {option for option, field in OPTIONS.items() if layer[option] != field.default}
    assert {option for option, row in ROWS.items() if row.state == "tested"} & OPTIONS.keys() <= named | changed


def test_every_refused_option_is_on_the_page() -> None:
    assert all(f"`{option}`" in PAGE for option in REFUSED)
