"""All runs of the experiment: first the learning rates are chosen, then every arm runs on the same new seeds."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

import torch
from common.kept import Kept, finish
from common.sizes import Size
from post_training.arms import ARMS
from post_training.training import TASKS, Job, Result, parse, run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from start import model as start
from start.corpus import Corpus

TUNING_SEED = 1000  # the first; those of the experiment itself begin at 0

_corpus: Corpus | None = None  # of a worker process


def run_all(
    size: Size, seeds: int, arms: Sequence[str], folder: Path, device: str, workers: int, console: Console
) -> list[Result]:
    """The runs that choose learning rates, on the validation split, and those of the experiment, on the test split.

    Those that are kept in the folder aren't done again.
    """
    kept = Kept(folder / "post_training.jsonl", {**dataclasses.asdict(size), "device": device}, parse)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        ProcessPoolExecutor(workers, spawn, _start_worker, (folder / "start",)) as pool,
    ):
        given = (size, folder / "start", device)
        tuning = finish(tuning_jobs(size, arms), kept, pool, _run, given, progress, "choosing learning rates")
        rates = chosen_rates(tuning)
        final = [
            Job(task, arm, rates[task, arm], seed, "test") for seed in range(seeds) for task in TASKS for arm in arms
        ]
        return tuning + finish(final, kept, pool, _run, given, progress, "training")


def tuning_jobs(size: Size, arms: Iterable[str] = ARMS) -> list[Job]:
    """The same learning rates and seeds for every arm."""
    rates = {"sft": size.sft_rates, "rl": size.rl_rates}
    return [
        Job(task, arm, rate, TUNING_SEED + seed, "validation")
        for task in TASKS
        for rate in rates[task]
        for arm in arms
        for seed in range(size.tuning_seeds)
    ]


def tuned(results: Iterable[Result]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """For each task and arm, the validation metric of every tuning run by learning rate."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for result in results:
        if result.job.split == "validation":
            rates = found.setdefault((result.job.task, result.job.arm), {})
            rates.setdefault(result.job.learning_rate, []).append(result.metric)
    return found


def chosen_rates(results: Iterable[Result]) -> dict[tuple[str, str], float]:
    """For each task and arm, the learning rate with the best mean on the validation split."""
    chosen = {}
    for (task, arm), rates in tuned(results).items():
        best = max if TASKS[task].higher_is_better else min
        chosen[task, arm] = best(rates, key=lambda rate: fmean(rates[rate]))
    return chosen


def _start_worker(folder: Path) -> None:
    global _corpus
    torch.set_num_threads(1)  # the workers share the cores, and a run is the same on any number of them
    _corpus = start.load_corpus(folder)


def _run(job: Job, size: Size, folder: Path, device: str) -> Result:
    assert _corpus is not None
    return run(job, _corpus, size, folder, device)
