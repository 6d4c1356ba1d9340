"""What PLAN.md decides once results are there: which learning rate, which verdict, what stands."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from common.kept import Kept
from common.significance import Comparison, Interval, holm
from planned.arms import EQUAL_TIME, FROZEN_ROUTER
from planned.comparisons import Compared, stands
from planned.parts import PARTS
from planned.running import Job, Result, parse
from planned.runs import Runs
from planned.sizes import PLANNED
from planned.texts import TEXTS
from post_training.arms import BASELINE

SIZE = PLANNED["tiny"]
SETTING = ("16 experts", next(iter(TEXTS)))


def _tuned(folder: Path, losses: dict[float, float]) -> Runs:
    """A part of which these validation losses are known, by learning rate."""
    kept = Kept(folder / "planned.jsonl", {}, parse)
    runs = Runs("up-cycled", SIZE, kept, {})
    for arm in (FROZEN_ROUTER, BASELINE):
        for rate, loss in losses.items():
            job = Job("up-cycled", *runs.part.settings[0], arm, rate, SIZE.up_cycled_steps, 2000, "validation")
            kept.add(Result(job, 9.0, loss, None, 0.0, 0.0))
    return runs


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        ({1e-3: 2.0, 1e-2: 1.0}, {0.1}),  # the best is at the upper edge
        ({1e-3: 1.0, 1e-2: 2.0}, {1e-4}),
        ({1e-3: 2.0, 1e-2: 1.0, 0.1: 0.5}, set()),  # the grid has grown as often as it may
        ({1e-3: 2.0, 1e-2: 1.0, 0.1: 3.0}, set()),
    ],
)
def test_a_grid_grows_where_the_best_is_at_its_edge(
    tmp_path: Path, known: dict[float, float], asked: set[float]
) -> None:
    missing = _tuned(tmp_path, known).missing()
    assert {job.rate for job in missing if job.split == "validation"} == asked
    if not asked:
        assert {job.rate for job in missing} == {min(known, key=lambda rate: known[rate])}
        assert {job.arm for job in missing} == {FROZEN_ROUTER, BASELINE}  # the others are behind the gate


def test_holm_is_closed_testing_with_bonferroni() -> None:
    """Corrected is the largest, over all sets that have the p-value, of the set's smallest times how many it has."""
    p = [0.001, 0.04, 0.03, 0.005, 0.2, 0.011]
    sets = [s for size in range(1, 7) for s in itertools.combinations(range(6), size)]
    expected = [max(min(1, len(s) * min(p[i] for i in s)) for s in sets if one in s) for one in range(6)]
    assert holm(p) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mean", "low", "high", "corrected", "verdict"),
    [
        (-0.03, -0.04, -0.02, 0.001, "better"),
        (0.03, 0.02, 0.04, 0.001, "worse"),
        (-0.03, -0.07, 0.01, 0.2, "undecided"),
        (-0.004, -0.006, -0.002, 0.001, "no difference that matters"),
        (0.0, -0.005, 0.005, 1.0, "no difference that matters"),
        (-0.009, -0.011, -0.007, 0.001, "undecided"),
    ],
)
def test_verdicts(mean: float, low: float, high: float, corrected: float, verdict: str) -> None:
    assert _compared("centered", BASELINE, SETTING, mean, low, high, corrected).verdict == verdict


def _compared(
    arm: str, base: str, setting: tuple[str, str], mean: float, low: float, high: float, corrected: float
) -> Compared:
    found = Comparison(Interval(mean, low, high), corrected)
    return Compared("router-only", setting, arm, base, found, found, corrected)


@pytest.mark.parametrize(("steps", "time", "expected"), [(4, 4, True), (4, 3, True), (4, 2, False), (3, 4, False)])
def test_what_stands(steps: int, time: int, expected: bool) -> None:
    better, unknown = (-0.03, -0.04, -0.02, 0.001), (-0.01, -0.05, 0.03, 1.0)
    found = []
    for place, setting in enumerate(PARTS["router-only"].settings):
        found.append(_compared("centered", BASELINE, setting, *(better if place < steps else unknown)))
        found.append(_compared("centered", EQUAL_TIME, setting, *(better if place < time else unknown)))
    assert stands(found) == (["centered"] if expected else [])
    worse = found[-1]._replace(test=Comparison(Interval(0.03, 0.02, 0.04), 0.001))
    assert stands([*found[:-1], worse._replace(corrected=0.001)]) == []
