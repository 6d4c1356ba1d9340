"""With how many tokens the ways to evaluate experts are tried."""

from __future__ import annotations

from densemixer_core.kernel import INTERPRETED

_FEWEST, _MOST = (16, 16) if INTERPRETED else (256, 4096)


def trial_tokens(tokens: int) -> int:
    """How many tokens the ways are tried with for a step of so many: which is fastest depends on their number."""
    return min(_MOST, max(_FEWEST, 1 << (tokens - 1).bit_length()))
