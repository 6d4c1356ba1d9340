"""What a user names may be anything, and so may the error that it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer

from densemixer_adapters.cli.printable import one_line, say
from densemixer_adapters.errors import UnsupportedModelError


def not_a_folder(checkpoint: str) -> str:
    """For the end of such a line: that it was looked for on the hub since it isn't a folder here, or is a file."""
    path = Path(checkpoint)
    if path.is_dir():
        return ""
    return f"; {checkpoint} is a file: name its folder" if path.is_file() else f"; there is no folder {checkpoint} here"


@contextlib.contextmanager
def reading(what: str, fix: str = "") -> Iterator[None]:
    """Ends with a line and status 2 where something can't be used.

    Args:
        what: That the line calls it.
        fix: What to do about it, for the end of the line.

    Raises:
        UnsupportedModelError: As it was raised: it is about a model that could be read.
    """
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        say(f"densemixer: can't use {what}: {kind}{one_line(error).rstrip('.')}{fix}", err=True)
        raise typer.Exit(2) from None
