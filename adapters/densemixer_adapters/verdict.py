"""What the router metrics of a run say, in one sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from densemixer_adapters.metric_names import CHANGE, LOST, NORM, SHARE

CHANGE_THRESHOLD = 0.01
"""The routing change below which a run's routers count as unchanged: fewer than one in a hundred choices."""
SHARE_THRESHOLD = 0.01
"""The share of the gradient below which unselected experts count as having no say."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether DenseMixer does something in a run, and why."""

    works: bool
    text: str


def judge(metrics: Mapping[str, float]) -> Verdict:
    """From a run's metrics over all layers, the last ones measured, by their names in `metric_names`.

    Args:
        metrics: Those that there are; what is missing says nothing.
    """
    idle = "DenseMixer is doing nothing here"
    share, change = metrics.get(SHARE), metrics.get(CHANGE)
    taught = "" if share is None else f"{_percent(share)} of the routers' gradient is from unselected experts"
    moved = "" if change is None else f"{_percent(change)} of the routers' choices changed since the start"
    if metrics.get(NORM) == 0:
        return Verdict(False, f"no gradient reaches the routers: {idle}")
    if share is not None and share < SHARE_THRESHOLD:
        return Verdict(False, f"{taught}: {idle}")
    if change is not None and change < CHANGE_THRESHOLD:
        lost = metrics.get(LOST, 0.0)
        reason = f"; rounding swallows {_percent(lost)} of the updates of their weights" if lost > 0.5 else ""
        return Verdict(False, f"{moved}: {idle}{reason}")
    found = " and ".join(filter(None, [taught, moved]))
    return Verdict(True, f"DenseMixer is at work: {found}; whether that helps, an evaluation must say")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.0005 or value == 0 else "less than 0.1 %"
