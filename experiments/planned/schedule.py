"""Does the runs of the experiment that was decided beforehand, those that haven't been done yet."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import torch
from common.kept import Kept, finish
from planned import timing
from planned.parts import PARTS
from planned.running import Job, Result, parse, prepare, run
from planned.runs import Runs
from planned.sizes import Planned
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROUTER_ONLY = "router-only"


def worker_pool(workers: int) -> Executor:
    """Processes of one thread each, which share the cores; a run is the same on any number of them."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def run_parts(names: Iterable[str], size: Planned, folder: Path, pool: Executor, console: Console) -> None:
    """Do what is missing of these parts. Start models are made when a run needs them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    kept, times = _kept(size, folder), folder / "step_times.json"
    for name in names:
        models = list(dict.fromkeys(start for start, _ in PARTS[name].settings))
        if name == ROUTER_ONLY and not timing.known(models, times):
            _prepare(models, size, folder, console)
            timing.measure(models, size, folder, times)
        runs = Runs(name, size, kept, timing.ratios(times))
        if runs.missing():
            _prepare(models, size, folder, console)
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            while jobs := runs.missing():
                said = f"{name}, {jobs[0].start}, {jobs[0].text}"
                finish(jobs, kept, pool, _run, (size, folder), progress, said)


def kept_parts(size: Planned, folder: Path) -> list[Runs]:
    """All parts of which something has been run, with what is kept of them."""
    kept, ratios = _kept(size, folder), timing.ratios(folder / "step_times.json")
    return [Runs(name, size, kept, ratios) for name in PARTS if any(job.part == name for job in kept.jobs)]


def _kept(size: Planned, folder: Path) -> Kept[Result]:
    return Kept(folder / "planned.jsonl", dataclasses.asdict(size), parse)


def _prepare(models: Iterable[str], size: Planned, folder: Path, console: Console) -> None:
    for model in models:
        prepare(model, size, folder, console)


def _run(job: Job, size: Planned, folder: Path) -> Result:
    return run(job, PARTS[job.part].arms[job.arm], size, folder)
