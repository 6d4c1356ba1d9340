"""Text from files that others wrote, made safe for a terminal and for a file name."""

from __future__ import annotations

import re

import typer


def printable(text: object) -> str:
    """Without control characters, escapes, changes of direction and broken Unicode: each becomes ``?``."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def one_line(text: object, length: int = 500) -> str:
    """The same, with white space made single spaces, and cut where it is longer."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def file_name(text: str) -> str:
    """What is left for a part of a file name: letters of ASCII, digits, ``.``, ``_`` and ``-``, at most 100."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100]


def say(*lines: str, err: bool = False) -> None:
    """Print lines, of which parts may be from files that others wrote."""
    for line in lines:
        typer.echo(printable(line), err=err)
