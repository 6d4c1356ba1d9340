"""What one check found."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Args:
        check: The name of the check that it belongs to.
        case: What was looked at.
        state: ``"skipped"`` where this machine or the host can't run it.
        found: What was measured, or why it was skipped or failed.
    """

    check: str
    case: str
    state: Literal["ok", "failed", "skipped"]
    found: str


def compared(check: str, case: str, error: float, allowed: float) -> Outcome:
    """Whether an error is one that is allowed; not-a-number isn't."""
    return Outcome(check, case, "ok" if error <= allowed else "failed", f"error {error:.1e}, allowed {allowed:.1e}")


def unbiased(check: str, case: str, draws: Tensor, truth: Tensor) -> Outcome:
    """Whether the mean over draws, [draws, ...], is off the truth by no more than their scatter lets expect."""
    draws, truth = draws.double(), truth.double()
    expected = (draws.var(0) / len(draws)).mean()
    ratio = float(((draws.mean(0) - truth).square().mean() / expected).sqrt())
    found = f"{ratio:.2f} of the error that the draws' scatter lets expect, allowed {_MOST:.2f}"
    return Outcome(check, case, "ok" if ratio < _MOST else "failed", found)


_MOST = 1.3
