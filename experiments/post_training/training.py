"""One run of post-training: an arm, a learning rate and a seed on one task."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from common.sizes import Size
from post_training.arms import attached
from post_training.docstrings import Docstrings
from post_training.statements import Statements
from post_training.tasks import Task
from probe import routing_change, selected_experts
from start import model as start
from start.corpus import Corpus
from transformers import get_cosine_schedule_with_warmup

from densemixer_adapters.metrics.gradients import RouterMeter
from densemixer_adapters.metrics.names import NORM, SHARE

EVALUATIONS = 5  # of the validation split on the way, besides the one before the first step


class Kind(NamedTuple):
    """A task without its data.

    Attributes:
        title: What a reader sees.
        metric: In words, with its unit.
    """

    make: Callable[[Corpus, Size, int, str], Task]
    title: str
    metric: str
    higher_is_better: bool


TASKS = {
    "sft": Kind(Docstrings, "SFT: function → docstring", "loss, nats/token", False),
    "rl": Kind(Statements, "RL: complete the statement", "mean reward", True),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        task: A key of `TASKS`.
        arm: A key of `arms.ARMS`.
        split: On what the result is measured: ``"validation"`` while learning rates are chosen, else ``"test"``.
    """

    task: str
    arm: str
    learning_rate: float
    seed: int
    split: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        metric: At the end of the run, on the job's split.
        curve: Steps taken and the metric on the validation split.
        routing_change: The share of the expert selections at the start that are no longer made at the end, on the
            task's probe.
        router_gradient: Norm of the gradient of all routers' weights, mean over the steps; 0 if they are frozen.
        share_unselected: The share of it that DenseMixer added, ‖added‖ / (‖added‖ + ‖conventional‖), likewise.
        seconds: The steps alone, without evaluations.
    """

    job: Job
    metric: float
    curve: list[tuple[int, float]]
    routing_change: float
    router_gradient: float
    share_unselected: float
    seconds: float


def parse(fields: dict[str, Any]) -> Result:
    """From JSON."""
    curve = [(step, value) for step, value in fields["curve"]]
    return Result(**{**fields, "job": Job(**fields["job"]), "curve": curve})


def run(job: Job, corpus: Corpus, size: Size, folder: Path, device: str) -> Result:
    """Post-train all weights of the start model, but for frozen routers."""
    model = start.load_model(folder, device)
    task = TASKS[job.task].make(corpus, size, job.seed, device)
    before = selected_experts(model, task.probe)
    with attached(model, job.arm) as gradients:
        groups = [{"params": list(model.parameters()), "lr": job.learning_rate}]
        trained = train(model, task, groups, EVALUATIONS, gradients)
    return Result(
        job=job,
        metric=trained.curve[-1][1] if job.split == "validation" else evaluate(model, task, job.split),
        curve=trained.curve,
        routing_change=routing_change(before, selected_experts(model, task.probe)),
        router_gradient=trained.router_gradient,
        share_unselected=trained.share_unselected,
        seconds=trained.seconds,
    )


class Trained(NamedTuple):
    """What was seen in training; as in `Result`."""

    curve: list[tuple[int, float]]
    router_gradient: float
    share_unselected: float
    seconds: float


def train(
    model: Any, task: Task, groups: list[dict[str, Any]], evaluations: int, gradients: RouterMeter | None = None
) -> Trained:
    """Train with AdamW, warmup and cosine, gradients clipped at norm 1.

    Args:
        model: The model, with DenseMixer attached if it is to train so.
        task: The data of each step.
        groups: What is trained, and at which rate, as the optimizer wants it.
        evaluations: How often the validation split is measured on the way, besides before the first step.
        gradients: Measures the gradient of the routers, if that is wanted.
    """
    optimizer = torch.optim.AdamW(groups)
    scheduler = get_cosine_schedule_with_warmup(optimizer, task.steps // 20, task.steps)
    marks = {round(task.steps * part / evaluations) for part in range(1, evaluations + 1)}
    curve = [(0, evaluate(model, task, "validation"))]
    norms, shares, seconds = [0.0], [0.0], 0.0
    for step in range(task.steps):
        began = time.perf_counter()
        model.train()
        task.loss(model, step).backward()
        if gradients:
            measured = gradients.gradients()
            norms.append(measured[NORM].whole)
            shares.append(measured[SHARE].whole)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
        if step + 1 in marks:
            curve.append((step + 1, evaluate(model, task, "validation")))
    return Trained(curve, fmean(norms[1:] or norms), fmean(shares[1:] or shares), seconds)


def evaluate(model: torch.nn.Module, task: Task, split: str) -> float:
    """The task's metric on a held-out split, without dropout."""
    model.eval()
    return task.evaluate(model, split)
