"""What both programs of this folder ask and say."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from common.sizes import SIZES
from rich.console import Console


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Those of this and of `gradient_quality`."""
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="small",
        help="small: two hours on 2 cores. large: for a GPU; it has not been run. tiny: seconds, and worth nothing "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/experiment"),
        metavar="FOLDER",
        help="where results, plots and the start model go; one of the same size that is there already is used again "
        "(default: %(default)s)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda has not been tried")


def set_determinism(device: str) -> None:
    """Let a CPU repeat a run exactly; with several threads, sums otherwise depend on which one is ready first."""
    torch.use_deterministic_algorithms(device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only takes time


def console_for() -> Console:
    """Wide enough for what isn't read on a terminal."""
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def environment(device: str) -> dict[str, str]:
    """Versions and hardware, for the records."""
    versions = {name: version(name) for name in ("torch", "transformers", "scipy")}
    return versions | {"python": platform.python_version(), "hardware": hardware(device)}


def hardware(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name} ({platform.machine()}), {os.cpu_count()} cores"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
