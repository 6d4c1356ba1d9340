"""``densemixer selftest``: the table of its checks, and the block of text to paste into an issue."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from densemixer_adapters.cli.columns import columns
from densemixer_adapters.cli.doctor import DISTRIBUTION
from densemixer_adapters.cli.printable import printable
from densemixer_adapters.selftest import Outcome

COLOURS = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
PACKAGES = (DISTRIBUTION, "torch", "transformers", "triton", "accelerate")


def watched(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The same outcomes, with a line on standard error that says where it is, if that is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        for outcome in outcomes:
            progress.update(task, description=f"{outcome.check}: {outcome.case}")
            yield outcome


def table(outcomes: Iterable[Outcome]) -> str:
    """A line each."""
    return columns(
        [
            (Text(one.state, COLOURS[one.state]), one.check, printable(one.case), printable(one.found))
            for one in outcomes
        ]
    )


def about() -> str:
    """The machine and the versions, in a line."""
    installed = {name: version for name in PACKAGES if (version := _version(name))}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    return f"{versions}; Python {platform.python_version()}, {platform.system()} {platform.machine()}, {device}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
