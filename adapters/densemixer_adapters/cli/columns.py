"""Columns of text. Each line is as long as it needs to be: a terminal wraps it, and a file or a pipe gets it whole."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LONGEST = 1 << 16


def columns(rows: Sequence[Sequence[str | Text]], heads: Sequence[str] = ()) -> str:
    """Rows as lines. Cells may have several lines.

    Args:
        rows: Their cells. A `Text` may have a colour, for which there are codes of a terminal in what is returned:
            `typer.echo` leaves them out where it doesn't write to one.
        heads: What stands above the columns. Those but the first are numbers, then, and stand at the right.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=bool(heads), header_style="")
    for position, head in enumerate(heads or [""] * len(rows[0])):
        table.add_column(Text(head), justify="right" if heads and position else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console = Console(file=io.StringIO(), width=_LONGEST, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
