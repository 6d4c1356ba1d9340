"""Tables and numbers with intervals, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.significance import Interval


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(value: Interval, spec: str) -> str:
    """The mean, and its confidence interval in brackets."""
    return f"{value.mean:{spec}} [{value.low:{spec}}, {value.high:{spec}}]"
