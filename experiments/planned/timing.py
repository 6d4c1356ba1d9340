"""How much longer a step with DenseMixer takes where routers alone are trained, on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch
from planned.arms import ROUTER_ONLY, training
from planned.language import Language
from planned.running import load, texts_of
from planned.sizes import Planned
from planned.texts import TEXTS
from post_training.arms import BASELINE

TIMED = (BASELINE, "densemixer", "centered", "centered, budget 1/32")
REPEATS = 3


def measure(starts: Iterable[str], size: Planned, folder: Path, file: Path) -> None:
    """Put processor seconds of a step into the file, by start model and arm, for those that it doesn't have.

    One thread; the arms take turns, on the same batches, and the median of their steps counts. Nothing is evaluated.
    """
    found = _read(file)
    for start in starts:
        if start not in found:
            found[start] = _time(start, size, folder)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def known(starts: Iterable[str], file: Path) -> bool:
    """Whether the file has the times of all of these."""
    return set(starts) <= set(_read(file))


def ratios(file: Path) -> dict[str, float]:
    """How much longer a step takes with the dearer one of the two estimators, by start model."""
    times = _read(file)
    return {start: max(arms["densemixer"], arms["centered"]) / arms[BASELINE] for start, arms in times.items()}


def _read(file: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _time(start: str, size: Planned, folder: Path) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = load(start, size, folder)
    task = Language(texts_of(next(iter(TEXTS)), start, folder), size, size.timed_steps, seed=0)
    seconds: dict[str, list[float]] = {arm: [] for arm in TIMED}
    for _ in range(REPEATS):
        for arm in TIMED:
            with training(model, ROUTER_ONLY[arm], rate=0.0) as groups:
                optimizer = torch.optim.AdamW(groups)
                model.train()
                for step in range(size.timed_steps):
                    began = time.process_time()
                    task.loss(model, step).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    seconds[arm].append(time.process_time() - began)
    torch.set_num_threads(threads)
    return {arm: median(found) for arm, found in seconds.items()}
