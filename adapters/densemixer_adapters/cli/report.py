"""``densemixer report``: the router metrics of a finished run, as curves, numbers and a verdict.

Reads what the frameworks write: ``trainer_state.json`` of the HF Trainer (LLaMA-Factory and TRL too), and the JSON
lines of verl's logger ``file``.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from densemixer_adapters.cli.printable import file_name, printable
from densemixer_adapters.metrics.names import (
    CHANGE,
    COSINE,
    DRIFT,
    ENTROPY,
    LEFT_OUT,
    LOST,
    MAXIMUM,
    NORM,
    PREFIX,
    SHARE,
)
from densemixer_adapters.metrics.verdict import Verdict, judge

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
    LEFT_OUT: "pairs of token and expert left out, which overflow",
}

LARGEST = 3.5e38
"""No value in float32 is larger."""

Points = list[tuple[int, float]]


class UnreadableRunError(Exception):
    """There is no log that can be read. The message says where it was looked for."""


@dataclasses.dataclass(frozen=True)
class Series:
    """The router metrics of one model in a run.

    Attributes:
        name: verl's role, as in ``actor``; empty if there is one model alone.
        source: The file that they are from.
        curves: By metric, over all layers: steps and values; NaN is what is no number that a metric can have.
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
        return judge(self.curves)


@dataclasses.dataclass(frozen=True)
class Run:
    """What the log of a run says.

    Attributes:
        series: The models; none if the log has no router metrics.
        left_out: What couldn't be read, a line for each file.
    """

    series: list[Series]
    left_out: list[str]


@dataclasses.dataclass(frozen=True)
class _Log:
    path: Path
    rows: list[tuple[int, dict[str, Any]]]
    broken: int

    @property
    def steps(self) -> int:
        return max((step for step, _ in self.rows), default=0)


def read_run(folder: Path) -> Run:
    """The router metrics in the log of a run.

    Args:
        folder: The run's output folder, or the log itself. In a folder it is ``trainer_state.json``, else that of the
            checkpoint below it with the most steps, else the one with the most steps of verl's ``*.jsonl``. What can't
            be read doesn't count, and neither does what is no ordinary file.

    Raises:
        UnreadableRunError: There is no log, or none can be read.
    """
    left_out: list[str] = []
    found_log = False
    try:
        for log in _logs(folder, left_out):
            found_log = True
            if log.broken:
                left_out.append(f"{log.path}: {log.broken} rows that neither the HF Trainer nor verl write")
            if series := _series(log.path, log.rows):
                return Run(series, left_out)
    except OSError as error:  # of a folder
        left_out.append(f"{folder}: {error.strerror}")
    if found_log:
        return Run([], left_out)
    raise UnreadableRunError(
        "; ".join(left_out)
        or f"{folder}: no {STATE} in it or in a checkpoint below it, and no JSON lines of verl (trainer.logger=[file])"
    )


def _logs(folder: Path, left_out: list[str]) -> Iterator[_Log]:
    if folder.is_dir():
        yield from _states(folder, left_out)
        yield from _verl_logs(folder, left_out)
    else:
        yield from _readable([folder], _lines if folder.suffix == ".jsonl" else _history, left_out)


def _states(folder: Path, left_out: list[str]) -> Iterator[_Log]:
    """The first state of the HF Trainer that can be read."""
    checkpoints = sorted(folder.glob(f"**/checkpoint-*/{STATE}"), key=_checkpoint_steps, reverse=True)
    own = [folder / STATE] if os.path.lexists(folder / STATE) else []
    return itertools.islice(_readable([*own, *checkpoints], _history, left_out), 1)


def _checkpoint_steps(state: Path) -> tuple[int, str]:
    number = re.fullmatch(r"checkpoint-([0-9]{1,18})", state.parent.name)
    return int(number[1]) if number else -1, str(state)


def _verl_logs(folder: Path, left_out: list[str]) -> list[_Log]:
    """verl's logs, the one with the most steps first."""
    paths = [path for path in sorted(folder.glob("**/*.jsonl")) if path.is_file() and _is_verl(path)]
    return sorted(_readable(paths, _lines, left_out), key=lambda log: log.steps, reverse=True)


def _is_verl(path: Path) -> bool:
    """Whether one of the first lines looks like that of verl's logger: LLaMA-Factory has JSON lines too."""
    try:
        with path.open("rb") as file:
            first = [file.readline(1 << 20) for _ in range(10)]
    except OSError:
        return False
    return any(isinstance(row, dict) and row.keys() == {"step", "data"} for row in map(_parse, first))


def _parse(text: str | bytes) -> Any:
    """What JSON text says; None if it is none, or nested too deeply. An integer that is too long counts as infinite."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 400 else math.inf)
    except (ValueError, RecursionError):
        return None


def _readable(paths: Iterable[Path], read: Callable[[str], list[Any]], left_out: list[str]) -> Iterator[_Log]:
    """The logs among files; what is none goes to ``left_out``."""
    for path in paths:
        try:
            if not path.is_file():  # a pipe, say, would wait for somebody to write
                raise ValueError("no ordinary file" if os.path.lexists(path) else "no such file or folder")
            found = read(path.read_text(encoding="utf-8", errors="replace"))
            rows = [row for row in found if _is_row(row)]
            if found and not rows:
                raise ValueError("no log of the HF Trainer or of verl")
            yield _Log(path, rows, len(found) - len(rows))
        except (OSError, ValueError) as error:
            left_out.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")


def _history(text: str) -> list[Any]:
    state = _parse(text)
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise ValueError("no log of the HF Trainer or of verl")
    return [(entry.get("step"), entry) if isinstance(entry, dict) else None for entry in history]


def _lines(text: str) -> list[Any]:
    rows = [_parse(line) for line in text.split("\n") if line.strip()]
    return [(row.get("step"), row.get("data")) if isinstance(row, dict) else None for row in rows]


def _is_row(row: Any) -> bool:
    """Whether it has a step, which a plot can show, and names with values."""
    if row is None:
        return False
    step, entry = row
    return type(step) is int and abs(step) < 1 << 53 and isinstance(entry, dict)


def _series(source: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Series]:
    found: dict[str, Series] = {}
    for step, role, layer, metric, value in _values(rows):
        series = found.setdefault(role, Series(role, source, {}, {}))
        curves = series.layers.setdefault(metric, {}) if layer else series.curves
        curves.setdefault(layer or metric, []).append((step, value))
    return [series for series in found.values() if series.curves]


def _values(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, str, str, str, float]]:
    """Step, role, layer, metric and value. verl puts the role before our names, as in ``actor/densemixer/…``."""
    for step, entry in rows:
        for name, value in entry.items():
            before, mark, after = name.rpartition(PREFIX)
            layer, _, metric = after.rpartition("/")
            if mark and metric in TITLES:
                yield step, printable(before.rstrip("/")), printable(layer), metric, _number(value)


def _number(value: Any) -> float:
    """NaN for what no metric can be: what is no number, infinite, or beyond float32, which they are measured in."""
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        return math.nan
    return float(value)


def as_json(series: Iterable[Series]) -> str:
    """Verdicts and numbers; ``null`` is what is no number."""
    found = [
        {
            "name": one.name,
            "source": printable(one.source),
            "works": one.verdict.works,
            "verdict": one.verdict.text,
            "last": {metric: _or_none(value) for metric, value in one.last.items()},
            "curves": _without_nan(one.curves),
            "layers": {metric: _without_nan(layers) for metric, layers in one.layers.items()},
        }
        for one in series
    ]
    return json.dumps(found, indent=2, allow_nan=False)


def _without_nan(curves: dict[str, Points]) -> dict[str, list[tuple[int, float | None]]]:
    return {name: [(step, _or_none(value)) for step, value in points] for name, points in curves.items()}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


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
        written.append(_replace(path, picture))
    return [*written, _replace(folder / "densemixer.html", _page(series, pictures).encode())]


def _replace(path: Path, content: bytes) -> Path:
    path.unlink(missing_ok=True)
    with path.open("xb") as file:  # fails if something is there again
        file.write(content)
    return path


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


def _page(series: list[Series], pictures: list[bytes]) -> str:
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    sections = [
        {
            "name": one.name or "Routers",
            "kind": {True: "works", False: "idle", None: "unknown"}[one.verdict.works],
            "verdict": one.verdict.text,
            "picture": base64.b64encode(picture).decode(),
            "rows": [(TITLES[metric], points[0][1], points[-1][1]) for metric, points in one.curves.items()],
            "source": printable(one.source),
        }
        for one, picture in zip(series, pictures, strict=True)
    ]
    page: str = pages.get_template("report.html").render(sections=sections)
    return page
