"""``densemixer report``: the router metrics of a finished run, as curves, numbers and a verdict.

Reads what the frameworks write: ``trainer_state.json`` of the HF Trainer (LLaMA-Factory and TRL too), and the JSON
lines of verl's logger ``file``.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from densemixer_adapters.metric_names import CHANGE, COSINE, DRIFT, ENTROPY, LOST, MAXIMUM, NORM, PREFIX, SHARE
from densemixer_adapters.verdict import Verdict, judge

STATE = "trainer_state.json"
TITLES = {
    NORM: "norm of the routers' gradient",
    SHARE: "share of it from unselected experts",
    COSINE: "cosine with the conventional gradient",
    ENTROPY: "entropy of the experts' load (1: even)",
    MAXIMUM: "load of the busiest expert / mean load",
    CHANGE: "routing changed since the start, share of selections",
    DRIFT: "drift of the logits since the start, relative",
    LOST: "share of updates lost to rounding",
}

Points = list[tuple[int, float]]


class UnreadableRunError(Exception):
    """There is no log that can be read. The message says where it was looked for."""


@dataclasses.dataclass(frozen=True)
class Series:
    """The router metrics of one model in a run.

    Attributes:
        name: verl's role, as in ``actor``; empty if there is one model alone.
        source: The file that they are from.
        curves: By metric, over all layers: steps and values.
        layers: By metric and layer, likewise.
    """

    name: str
    source: Path
    curves: dict[str, Points]
    layers: dict[str, dict[str, Points]]

    @property
    def last(self) -> dict[str, float]:
        return {name: points[-1][1] for name, points in self.curves.items()}

    @property
    def verdict(self) -> Verdict:
        return judge(self.last)


def read_run(folder: Path) -> list[Series]:
    """The router metrics in the log of a run; none if it has no such metrics.

    Args:
        folder: The run's output folder, or the log itself. In a folder it is ``trainer_state.json``, else that of the
            newest checkpoint below it; else verl's ``*.jsonl``.

    Raises:
        UnreadableRunError: There is no log, or it can't be read.
    """
    source = _find_log(folder)
    try:
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            entries = [(line["step"], line["data"]) for line in lines]
        else:
            entries = [(entry["step"], entry) for entry in json.loads(text)["log_history"]]
        return _series(source, entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableRunError(f"{source} is no log of the HF Trainer or of verl: {error!r}") from None


def _find_log(folder: Path) -> Path:
    if folder.is_file():
        return folder
    if (folder / STATE).is_file():
        return folder / STATE
    states = sorted(folder.glob(f"**/checkpoint-*/{STATE}"), key=lambda path: path.stat().st_mtime)
    if states:
        return states[-1]
    logs = sorted((path for path in folder.glob("**/*.jsonl") if _is_verl(path)), key=lambda path: path.stat().st_mtime)
    if logs:
        return logs[-1]
    raise UnreadableRunError(
        f"{folder}: no {STATE} in it or in a checkpoint below it, and no JSON lines of verl (trainer.logger=[file])"
    )


def _is_verl(path: Path) -> bool:
    """Whether the first line looks like that of verl's logger: LLaMA-Factory has JSON lines too."""
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        line = json.loads(first)
    except ValueError:
        return False
    return isinstance(line, dict) and line.keys() == {"step", "data"}


def _series(source: Path, entries: Iterable[tuple[int, dict[str, Any]]]) -> list[Series]:
    found: dict[str, Series] = {}
    for step, role, layer, metric, value in _values(entries):
        series = found.setdefault(role, Series(role, source, {}, {}))
        curves = series.layers.setdefault(metric, {}) if layer else series.curves
        curves.setdefault(layer or metric, []).append((step, value))
    return [series for series in found.values() if series.curves]


def _values(entries: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, str, str, str, float]]:
    """Step, role, layer, metric and value. verl puts the role before our names, as in ``actor/densemixer/…``."""
    for step, entry in entries:
        for name, value in entry.items():
            before, mark, after = name.rpartition(PREFIX)
            layer, _, metric = after.rpartition("/")
            if mark and metric in TITLES:
                yield int(step), before.rstrip("/"), layer, metric, float(value)


def as_json(series: Iterable[Series]) -> str:
    """Verdicts and numbers."""
    found = [
        {
            "name": one.name,
            "source": str(one.source),
            "works": one.verdict.works,
            "verdict": one.verdict.text,
            "last": one.last,
            "curves": one.curves,
            "layers": one.layers,
        }
        for one in series
    ]
    return json.dumps(found, indent=2)


def write(series: list[Series], folder: Path) -> list[Path]:
    """Draw the curves: one PNG for each model, and one HTML page with all of them, numbers and verdicts.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, sections = [], []
    for one in series:
        picture = _draw(one)
        name = f"densemixer-{one.name.replace('/', '-')}.png" if one.name else "densemixer.png"
        (folder / name).write_bytes(picture)
        written.append(folder / name)
        sections.append(_section(one, picture))
    page = folder / "densemixer.html"
    page.write_text(_PAGE.format(sections="\n".join(sections)), encoding="utf-8")
    return [*written, page]


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


def _section(series: Series, picture: bytes) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(TITLES[metric])}</td><td>{points[0][1]:.4g}</td><td>{points[-1][1]:.4g}</td></tr>"
        for metric, points in series.curves.items()
    )
    verdict = series.verdict
    return (
        f"<h2>{html.escape(series.name or 'Routers')}</h2>\n"
        f'<p class="{"works" if verdict.works else "idle"}">{html.escape(verdict.text)}</p>\n'
        f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">\n'
        f"<table><tr><th></th><th>first</th><th>last</th></tr>{rows}</table>\n"
        f"<p>Black: over all layers; blue: each layer. From {html.escape(str(series.source))}.</p>"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>DenseMixer: router metrics</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; }}
td, th {{ padding: 0.1em 1em 0.1em 0; text-align: left; }}
.works, .idle {{ font-weight: bold; }}
.works {{ color: #176117; }}
.idle {{ color: #a11; }}
</style>
</head>
<body>
<h1>DenseMixer: router metrics</h1>
{sections}
</body>
</html>
"""
