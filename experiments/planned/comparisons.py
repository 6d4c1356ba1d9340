"""All comparisons of the experiment that was decided beforehand, and what each of them says by PLAN.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from common.significance import CONFIDENCE, Comparison, holm, paired
from planned.arms import EQUAL_TIME, FROZEN_START
from planned.parts import PARTS
from planned.runs import Runs
from post_training.arms import BASELINE

OF_INTEREST = 0.01
"""The smallest difference of losses that matters, in nats per token."""


class Compared(NamedTuple):
    """An arm less another on the same seeds, in one setting.

    Attributes:
        setting: Start model and text.
        test: Of the losses on the test split.
        validation: Of those on the validation split; only a look at how far the held-out text matters.
        corrected: The p-value of ``test``, corrected for all comparisons of all parts.
    """

    part: str
    setting: tuple[str, str]
    arm: str
    base: str
    test: Comparison
    validation: Comparison
    corrected: float

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``no difference that matters`` or ``undecided``."""
        mean, low, high = self.test.difference
        if self.corrected < 1 - CONFIDENCE and abs(mean) >= OF_INTEREST:
            return "better" if mean < 0 else "worse"
        return "no difference that matters" if low > -OF_INTEREST and high < OF_INTEREST else "undecided"


def compare(parts: Iterable[Runs]) -> list[Compared]:
    """Every comparison in settings that have all their runs."""
    found = []
    for runs in parts:
        for setting in filter(runs.done, runs.part.settings):
            for arm, base in runs.part.compared:
                if not {arm, base} <= set(runs.arms()):
                    continue  # behind a gate that wasn't passed
                test, validation = (
                    paired(runs.losses(setting, arm, split), runs.losses(setting, base, split))
                    for split in ("test", "validation")
                )
                found.append(Compared(runs.name, setting, arm, base, test, validation, 1.0))
    corrected = holm([one.test.p for one in found])
    return [one._replace(corrected=p) for one, p in zip(found, corrected, strict=True)]


def stands(compared: Iterable[Compared]) -> list[str]:
    """The arms for which training routers alone stands: better everywhere; at equal time in 3 of 4, never worse."""
    found = []
    alone = [one for one in compared if one.part == "router-only"]
    settings = PARTS["router-only"].settings
    for arm in dict.fromkeys(one.arm for one in alone if one.arm != FROZEN_START):
        steps, time = (
            [one.verdict for one in alone if (one.arm, one.base) == (arm, base)] for base in (BASELINE, EQUAL_TIME)
        )
        enough = time.count("better") >= 3 * len(settings) / 4 and "worse" not in time
        if steps == ["better"] * len(settings) and len(time) == len(settings) and enough:
            found.append(arm)
    return found
