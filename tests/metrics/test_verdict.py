"""What is said of metrics, and on what evidence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from densemixer_adapters.metrics.names import CHANGE, LOST, NORM, SHARE
from densemixer_adapters.metrics.verdict import ENOUGH_STEPS, judge

FROZEN = "no gradient reaches the routers: DenseMixer is doing nothing here"
NAN = math.nan
CASES: dict[str, tuple[dict[str, float], int, bool | None, str]] = {
    "at work": ({NORM: 1, SHARE: 0.3, CHANGE: 0.1}, 2, True, "30.0 % of the routers' gradient"),
    "a share alone": ({SHARE: 0.3}, 2, True, "30.0 % of the routers' gradient"),
    "no gradient": ({NORM: 0, CHANGE: 0.1}, 2, False, FROZEN),
    "no gradient, and a share of it": ({NORM: 0, SHARE: 0}, 500, False, FROZEN),
    "conventional": ({NORM: 1, SHARE: 0}, 2, False, "0.0 % of the routers' gradient"),
    "a small share": ({SHARE: 0.002}, 100, False, "0.2 % of the routers' gradient"),
    "a small share so far": ({SHARE: 0.002}, 99, None, "after 99 steps: below 100"),
    "unchanged": ({SHARE: 0.3, CHANGE: 0.002}, 100, False, "0.2 % of the routers' choices"),
    "unchanged so far": ({SHARE: 0.3, CHANGE: 0}, 2, None, "after 2 steps: below 100"),
    "unchanged, no share": ({CHANGE: 0.002}, 100, False, "0.2 % of the routers' choices"),
    "changed, no share": ({NORM: 1, CHANGE: 0.038}, 500, None, "3.8 % of the routers' choices changed"),
    "changed, nothing else": ({CHANGE: 0.038}, 500, None, "can't say whether DenseMixer is at work"),
    "nothing": ({}, 0, None, "can't say"),
    "no numbers": ({NORM: NAN, SHARE: NAN, CHANGE: NAN}, 500, None, "can't say"),
    "no share that can be": ({SHARE: 7.0, CHANGE: 0.1}, 500, None, "can't say"),
    "lost": ({SHARE: 0.3, CHANGE: 0, LOST: 0.9}, 500, False, "rounding swallows 90.0 %"),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict(case: str) -> None:
    metrics, step, works, text = CASES[case]
    verdict = judge({name: [(step, float(value))] for name, value in metrics.items()})
    assert verdict.works is works, verdict.text
    assert text in verdict.text


def test_what_was_measured_last_counts() -> None:
    assert judge({SHARE: [(1, 0.0), (2, 0.3)]}).works is True
    assert judge({SHARE: [(1, 0.3), (2, math.nan)]}).works is None
    assert judge({SHARE: [(1, 0.3), (500, 0.001)], CHANGE: [(1, 0.5), (500, 0.5)]}).works is False


def test_choices_that_changed_before_a_run_was_resumed() -> None:
    """The process that resumes it compares with its checkpoint, and its steps go on where the others ended."""
    verdict = judge({SHARE: [(400, 0.3), (401, 0.3)], CHANGE: [(400, 0.266), (401, 0.008)]})
    assert verdict.works is None
    assert "0.8 % of the routers' choices changed since the start, and up to 26.6 % at an earlier step" in verdict.text
    assert judge({SHARE: [(400, 0.3), (401, 0.3)], CHANGE: [(400, math.nan), (401, 0.008)]}).works is False


@pytest.mark.parametrize("share", [0.3, math.nan])
def test_a_resumed_run_that_works_says_which_start_is_meant(share: float) -> None:
    changes = [(50, 0.81), (55, 0.23), (100, 0.38), (105, 0.05), (150, 0.14)]
    text = judge({SHARE: [(150, share)], CHANGE: changes}).text
    assert "14.0 % of the routers' choices changed since the start (up to 81.0 % at an earlier step: if the run" in text
    assert "earlier step" not in judge({SHARE: [(150, share)], CHANGE: [(50, 0.16), *changes[-1:]]}).text


def test_routers_that_take_turns_are_not_frozen() -> None:
    """As BAdam has it: in the last step measured, no router had a gradient, so the share there is one of nothing."""
    curves = {
        NORM: [(100, 0.5), (200, 0.0)],
        SHARE: [(100, 0.3), (200, 0.0)],
        CHANGE: [(100, 0.1), (200, 0.1)],
    }
    assert judge(curves).works is True
    curves[NORM][0] = (100, 0.0)
    assert judge(curves).works is False


def test_enough_steps_is_what_the_page_says() -> None:
    assert f"after {ENOUGH_STEPS} steps" in (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
