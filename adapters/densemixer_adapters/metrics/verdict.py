"""What the router metrics of a run say, in one sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from densemixer_adapters.metrics.names import CHANGE, LOST, NORM, SHARE

CHANGE_THRESHOLD = 0.01
"""The routing change below which a run's routers count as unchanged: fewer than one in a hundred choices."""
SHARE_THRESHOLD = 0.01
"""The share of the gradient below which unselected experts count as having no say."""
ENOUGH_STEPS = 100
"""How many steps it takes to say that nothing happens.

One in a hundred choices changes where the logits move by a hundredth of their spread (random logits; 8 of 128 experts,
8 of 64, 4 of 32). A logit is a product with some 2000 inputs of size 1, and Adam moves a weight by up to the learning
rate in a step: at 1e-5 that is up to 0.016 a step. Where all but a hundredth of it cancels out, it takes a hundred
steps. Zero is zero from the first step on.
"""

Points = Sequence[tuple[int, float]]
"""Steps, and the values measured there."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether DenseMixer does something in a run, and why.

    Attributes:
        works: None if what was measured can't say.
        text: A sentence without its full stop.
    """

    works: bool | None
    text: str


def judge(curves: Mapping[str, Points]) -> Verdict:
    """From a run's metrics over all layers, by their `names`.

    It follows from what was measured last: what is missing, or no number, is no evidence.

    Args:
        curves: Those that there are, in the order of the steps, which are counted from the start of the run.
    """
    idle = "DenseMixer is doing nothing here"
    norms = dict(curves.get(NORM, ()))
    if norms and all(norm == 0 for norm in norms.values()):
        return Verdict(False, f"no gradient reaches the routers: {idle}")
    # Of no gradient nothing can be a share, as in a step in which all routers that it reaches are frozen.
    share = _last([point for point in curves.get(SHARE, ()) if norms.get(point[0]) != 0])
    change, lost = _last(curves.get(CHANGE, ())), _last(curves.get(LOST, ()))
    steps = max((step for points in curves.values() for step, _ in points), default=0)
    taught = "" if share is None else f"{percent(share)} of the routers' gradient is from unselected experts"
    moved = "" if change is None else f"{percent(change)} of the routers' choices changed since the start"
    small = ""
    if share is not None and share < SHARE_THRESHOLD:
        small = taught
    elif change is not None and change < CHANGE_THRESHOLD:
        small = moved
    reason = f"; rounding swallows {percent(lost)} of the updates of their weights" if lost and lost > 0.5 else ""
    # A process that resumes a run counts changes anew, and the log doesn't say where that was.
    before = max((value for _, value in curves.get(CHANGE, ()) if 0 <= value <= 1), default=0)
    earlier = f"up to {percent(before)} at an earlier step: if the run was resumed, that start is its checkpoint"
    if small and small == moved and before >= CHANGE_THRESHOLD:
        return Verdict(None, f"{moved}, and {earlier}, and it may be too early to say{reason}")
    if small and (steps >= ENOUGH_STEPS or share == 0):
        return Verdict(False, f"{small}: {idle}{reason}")
    if small:
        return Verdict(None, f"{small}, after {steps} steps: below {ENOUGH_STEPS}, that is too early to say{reason}")
    if change is not None and change < before / 2:
        moved += f" ({earlier})"
    if share is None:
        unknown = "what part of the routers' gradient is from unselected experts wasn't measured"
        found = f"{moved}, but {unknown}" if moved else unknown
        return Verdict(None, f"can't say whether DenseMixer is at work: {found}")
    found = " and ".join(filter(None, [taught, moved]))
    return Verdict(True, f"DenseMixer is at work: {found}; whether that helps, an evaluation must say")


def _last(points: Points) -> float | None:
    """The last value, if it is one that a share can have."""
    return points[-1][1] if points and 0 <= points[-1][1] <= 1 else None


def percent(value: float) -> str:
    """A share, for a sentence."""
    return f"{100 * value:.1f} %" if value >= 0.0005 or value == 0 else "less than 0.1 %"
