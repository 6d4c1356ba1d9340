"""What the switches of different frameworks have in common."""

from __future__ import annotations

from densemixer_core.config import read_flag


def quotes(value: object) -> str:
    """The end of the message about a switch that is neither true nor false: what to do if it is so in quotes alone."""
    try:
        word = isinstance(value, str) and str(read_flag(value)).lower()
    except ValueError:
        word = ""
    return f"; write {word}, without quotes" if word else ""
