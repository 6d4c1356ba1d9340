"""The parts of the experiment: what each compares, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from planned.arms import EQUAL_TIME, FROZEN_ROUTER, FROZEN_START, ROUTER_ONLY, ROUTER_RATE, UP_CYCLED, Arm
from planned.running import DOCSTRINGS, MIXED
from planned.running import UP_CYCLED as UP_CYCLED_START
from planned.texts import TEXTS
from post_training.arms import BASELINE


class Part(NamedTuple):
    """A part.

    Attributes:
        settings: Start models and texts.
        compared: Pairs of an arm and what it is compared with; all get one correction for their number.
    """

    title: str
    settings: tuple[tuple[str, str], ...]
    arms: Mapping[str, Arm]
    compared: tuple[tuple[str, str], ...]


def _against(base: str, *arms: str) -> tuple[tuple[str, str], ...]:
    return tuple((arm, base) for arm in arms)


_DENSE = ("densemixer", "centered", "centered, budget 1/32")

PARTS = {
    "router-only": Part(
        "Routers alone are trained",
        tuple((start, text) for start in ("16 experts", "32 experts") for text in TEXTS),
        ROUTER_ONLY,
        (*_against(BASELINE, FROZEN_START, *_DENSE), *_against(EQUAL_TIME, *_DENSE)),
    ),
    "router-rate": Part(
        "Routers with ten times the learning rate, in the SFT task",
        (("16 experts", DOCSTRINGS),),
        ROUTER_RATE,
        (
            *_against(BASELINE, *(arm for arm in ROUTER_RATE if arm != BASELINE)),
            *_against("conventional, x10", "densemixer, x10", "centered, x10"),
        ),
    ),
    "up-cycled": Part(
        "A model of copies of a dense one",
        ((UP_CYCLED_START, MIXED),),
        UP_CYCLED,
        _against(BASELINE, FROZEN_ROUTER, "densemixer", "centered"),
    ),
}
