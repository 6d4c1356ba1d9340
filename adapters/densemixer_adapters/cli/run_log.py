"""The router metrics in the log of a finished run.

Reads what the frameworks write: ``trainer_state.json`` of the HF Trainer (LLaMA-Factory and TRL too), and the JSON
lines of verl's logger ``file``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from densemixer_adapters.cli.printable import printable
from densemixer_adapters.metrics.names import PREFIX, TITLES
from densemixer_adapters.metrics.verdict import Verdict, judge

STATE = "trainer_state.json"

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
        start: The last step of the log before they were measured: a run may be resumed with them.
    """

    name: str
    source: Path
    curves: dict[str, Points]
    layers: dict[str, dict[str, Points]]
    start: int = 0

    @property
    def last(self) -> dict[str, float]:
        return {name: points[-1][1] for name, points in self.curves.items()}

    @property
    def verdict(self) -> Verdict:
        curves = self.curves.items()
        return judge({name: [(step - self.start, value) for step, value in points] for name, points in curves})


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
        or f"{folder}: no {STATE} in it or in a checkpoint below it, and no JSON lines of verl "
        "(trainer.logger=[file]). The HF Trainer writes it with a checkpoint, or by trainer.save_state()"
    )


def _logs(folder: Path, left_out: list[str]) -> Iterator[_Log]:
    if folder.is_dir():
        yield from _states(folder, left_out)
        yield from _verl_logs(folder, left_out)
    else:
        yield from _readable([folder], _lines if folder.suffix == ".jsonl" else _history, left_out)


def _states(folder: Path, left_out: list[str]) -> Iterator[_Log]:
    """The first state of the HF Trainer that can be read, or that of a checkpoint with which the same run went on."""
    checkpoints = sorted(folder.glob(f"**/checkpoint-*/{STATE}"), key=_checkpoint_steps, reverse=True)
    own = [folder / STATE] if os.path.lexists(folder / STATE) else []
    states = _readable([*own, *checkpoints], _history, left_out)
    first = next(states, None)
    # The folder's own is written as training ends. Who resumes the run adds to its rows, and may not have ended.
    more = next(states, None) if own else None
    if more is not None and first is not None and more.steps > first.steps and more.rows[:1] == first.rows[:1]:
        first = more
    if first is not None:
        yield first


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
    before = now = 0
    for row in rows:
        if row[0] != now:
            before, now = now, row[0]
        for step, role, layer, metric, value in _values(row):
            series = found.setdefault(role, Series(role, source, {}, {}, min(before, now)))
            curves = series.layers.setdefault(metric, {}) if layer else series.curves
            curves.setdefault(layer or metric, []).append((step, value))
    return [series for series in found.values() if series.curves]


def _values(row: tuple[int, dict[str, Any]]) -> Iterator[tuple[int, str, str, str, float]]:
    """Step, role, layer, metric and value. verl puts the role before our names, as in ``actor/densemixer/…``."""
    step, entry = row
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
