"""The comparison from end to end: a start model, two fine-tunings of it, a report."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import report
from data import Example, library_files, split
from results import Run
from rich.console import Console
from settings import DemoError, Settings


def compare(examples: list[Example], settings: Settings, output: Path, console: Console) -> None:
    """Run both arms on the examples and leave table, curves and numbers; pretrain a model first if none is given.

    Raises:
        DemoError: The options, the data or the model can't be used.
    """
    train, held_out = split(examples, settings.seed)
    console.print(f"data: {len(train)} examples to train on, {len(held_out)} held out")
    if settings.pretrain_steps:
        unseen = {example.source for example in held_out}
        files = [file for file in library_files() if str(file) not in unseen]
        console.print(f"pretraining a small model on the standard library: {settings.pretrain_steps} steps")
        _in_new_process("model", "pretrain", files, settings)

    console.print("fine-tuning conventionally")
    conventional: Run = _in_new_process("finetune", "fine_tune", train, held_out, settings, False)
    console.print("fine-tuning with DenseMixer")
    densemixer: Run = _in_new_process("finetune", "fine_tune", train, held_out, settings, True)

    curves, numbers = output / "curves.png", output / "results.json"
    report.draw(conventional, densemixer, settings, curves)
    report.write_numbers(conventional, densemixer, settings, numbers)
    console.print(f"ran on: {conventional.hardware}", soft_wrap=True)
    console.print(report.table(conventional, densemixer, settings))
    console.print(f"Curves: {curves}\nNumbers: {numbers}\n", soft_wrap=True)
    console.print(report.notes(conventional))


def _in_new_process(module: str, function: str, *arguments: Any) -> Any:
    """Call it in a fresh interpreter: its peak memory is its own, and nothing of an earlier run is left in it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_call, module, function, *arguments).result()
        except BrokenProcessPool:
            raise DemoError(
                "the training process was killed, most likely for lack of memory; "
                "try a smaller --batch-size or --max-length"
            ) from None


def _call(module: str, function: str, *arguments: Any) -> Any:
    # By name, so that the process that only waits and reports needn't import torch.
    return getattr(import_module(module), function)(*arguments)
