"""Test support: a verifiable reward that a random model gets often enough to learn from."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """Half for the share of characters that are ASCII letters or digits, half for the right sum."""
    readable = sum(c.isascii() and c.isalnum() for c in solution_str) / max(1, len(solution_str))
    return 0.5 * readable + 0.5 * (solution_str.strip() == ground_truth)
