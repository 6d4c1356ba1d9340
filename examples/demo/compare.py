"""The comparison from end to end: a start model, two fine-tunings of it, a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import report
import torch
from data import Example, library_files, split
from finetune import fine_tune
from model import pretrain
from rich.console import Console
from settings import DemoError, Settings

from densemixer_core import DenseMixerConfig

P = ParamSpec("P")
T = TypeVar("T")


def compare(examples: list[Example], settings: Settings, output: Path, console: Console) -> None:
    """Run both arms on the examples and leave table, curves and numbers; pretrain a model first if none is given.

    Raises:
        DemoError: The options, the data or the model can't be used.
    """
    settings = _checked(settings)
    for name, value in report.environment(settings).items():
        console.print(f"{name}: {value}", soft_wrap=True)
    train, held_out = split(examples, settings.seed)
    console.print(f"data: {len(train)} examples to train on, {len(held_out)} held out")
    if settings.pretrain_steps:
        unseen = {example.source for example in held_out}
        files = [file for file in library_files() if str(file) not in unseen]
        console.print(f"pretraining a small model on the standard library: {settings.pretrain_steps} steps")
        _in_new_process(pretrain, files, settings)

    console.print("fine-tuning conventionally")
    conventional = _in_new_process(fine_tune, train, held_out, settings, densemixer=False)
    console.print("fine-tuning with DenseMixer")
    densemixer = _in_new_process(fine_tune, train, held_out, settings, densemixer=True)

    curves, numbers = output / "curves.png", output / "results.json"
    report.draw(conventional, densemixer, settings, curves)
    report.write_numbers(conventional, densemixer, settings, numbers)
    console.print(report.table(conventional, densemixer, settings))
    console.print(f"Curves: {curves}\nNumbers: {numbers}\n", soft_wrap=True)
    console.print(report.notes(conventional, settings))


def _checked(settings: Settings) -> Settings:
    """The settings with the device that "auto" stands for."""
    try:
        DenseMixerConfig(estimator=settings.estimator)
    except ValueError as error:
        raise DemoError(f"--estimator: {error}") from None
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise DemoError("--device cuda: torch sees no CUDA device here")
    device = ("cuda" if cuda else "cpu") if settings.device == "auto" else settings.device
    return dataclasses.replace(settings, device=device)


def _in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in a fresh interpreter: its peak memory is its own, and nothing of an earlier run is left in it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise DemoError(
                "the training process was killed, most likely for lack of memory; "
                "try a smaller --batch-size or --max-length"
            ) from None
