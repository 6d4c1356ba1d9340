"""The plot of the experiment that was decided beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from planned.comparisons import OF_INTEREST, Compared

COLOURS = {"better": "tab:green", "worse": "tab:red", "no difference that matters": "black", "undecided": "tab:gray"}


def draw(compared: Sequence[Compared], file: Path) -> None:
    """Every comparison with its interval; between the dotted lines nothing matters."""
    figure = Figure(figsize=(10, 1 + 0.28 * len(compared)), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(compared):
        mean, low, high = one.test.difference
        axes.errorbar(
            mean, place, xerr=[[mean - low], [high - mean]], fmt="o", ms=4, capsize=3, color=COLOURS[one.verdict]
        )
    axes.axvline(0, color="black", linewidth=0.8)
    for edge in (-OF_INTEREST, OF_INTEREST):
        axes.axvline(edge, color="black", linewidth=0.8, linestyle=":")
    names = [f"{', '.join(one.setting)}: {one.arm} less {one.base}" for one in compared]
    axes.set_yticks(range(len(compared)), names, fontsize="small")
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=2 * OF_INTEREST)
    axes.set(xlabel="difference on the test split, nats/token; better is to the left")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=90)
