"""With how many tokens the ways to evaluate experts are tried."""

from __future__ import annotations

from densemixer_core.kernel import INTERPRETED

_FEWEST, _MOST = (16, 16) if INTERPRETED else (256, 4096)
_SHORT = 5
"""By so many the last tile isn't full, so that this is tried too."""


def trial_tokens(tokens: int) -> int:
    """How many tokens the ways are tried with for a step of so many: which is fastest depends on their number.

    A few short of a power of two, so that a run has few trials. Of such a number it is that number: the kernel, which
    asks again within a trial, is tuned there for the steps that come.
    """
    return min(_MOST, max(_FEWEST, 1 << (tokens + _SHORT - 1).bit_length())) - _SHORT
