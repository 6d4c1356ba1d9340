"""``densemixer report``: the router metrics of a finished run, as curves, numbers and a verdict."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

from densemixer_adapters.cli.page import Section, Table, page, replace
from densemixer_adapters.cli.printable import file_name, printable
from densemixer_adapters.cli.run_log import Points, Series
from densemixer_adapters.metrics.names import TITLES


def as_json(series: Iterable[Series]) -> str:
    """Verdicts and numbers; ``null`` is what is no number."""
    found = [
        {
            "name": one.name,
            "source": printable(one.source),
            "works": one.verdict.works,
            "verdict": one.verdict.text,
            "last": {metric: or_none(value) for metric, value in one.last.items()},
            "curves": _without_nan(one.curves),
            "layers": {metric: _without_nan(layers) for metric, layers in one.layers.items()},
        }
        for one in series
    ]
    return json.dumps(found, indent=2, allow_nan=False)


def _without_nan(curves: dict[str, Points]) -> dict[str, list[tuple[int, float | None]]]:
    return {name: [(step, or_none(value)) for step, value in points] for name, points in curves.items()}


def or_none(value: float) -> float | None:
    """What JSON knows: a finite number, or nothing."""
    return value if math.isfinite(value) else None


def write(series: list[Series], folder: Path) -> list[Path]:
    """Draw the curves: one PNG for each model, and one HTML page with all of them, numbers and verdicts.

    Links in the place of these files are replaced, not followed.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: A file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    pictures = [_draw(one) for one in series]
    for one, picture in zip(series, pictures, strict=True):
        name = f"densemixer-{file_name(one.name)}" if one.name else "densemixer"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        path = next(path for name in names if (path := folder / f"{name}.png") not in written)
        written.append(replace(path, picture))
    sections = [_section(one, picture) for one, picture in zip(series, pictures, strict=True)]
    return [*written, replace(folder / "densemixer.html", page("DenseMixer: router metrics", sections))]


def _draw(series: Series) -> bytes:
    from matplotlib.figure import Figure  # no pyplot: it would choose a display

    metrics = [metric for metric in TITLES if metric in series.curves]
    rows = -(-len(metrics) // 2)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    for position, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, 2, position + 1)
        for points in series.layers.get(metric, {}).values():
            axes.plot(*zip(*points, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*series.curves[metric], strict=True), color="black", marker=".", linewidth=1.4)
        axes.set_title(TITLES[metric], fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if all(value >= 0 for _, value in series.curves[metric]):
            axes.set_ylim(bottom=0)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _section(series: Series, picture: bytes) -> Section:
    rows = [(TITLES[metric], f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}") for metric, points in series.curves.items()]
    return Section(
        series.name or "Routers",
        series.verdict,
        picture,
        [Table(("", "first", "last"), rows)],
        f"Black: over all layers; blue: each layer. From {printable(series.source)}.",
    )
