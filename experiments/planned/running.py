"""One run: an arm at a learning rate and a seed, from one start model, on one text."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import torch
from planned.arms import Arm, training
from planned.language import Language
from planned.sizes import Planned
from planned.texts import TEXTS, token_ids
from planned.upcycled import upcycle
from post_training.docstrings import Docstrings
from post_training.tasks import Task
from post_training.training import evaluate, train
from probe import routing_change, selected_experts
from rich.console import Console
from start import model as start
from torch import Tensor

UP_CYCLED = "up-cycled"
MIXED = "mixed"
DOCSTRINGS = "docstrings"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        part: A key of `parts.PARTS`.
        start: A name of a start model, or `UP_CYCLED`.
        text: A key of `texts.TEXTS`, `MIXED` or `DOCSTRINGS`.
        arm: One of the part's arms.
        rate: The learning rate.
        split: On what the result is measured: ``"validation"`` while learning rates are chosen, else ``"test"``.
    """

    part: str
    start: str
    text: str
    arm: str
    rate: float
    steps: int
    seed: int
    split: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out. Losses are in nats per token.

    Attributes:
        before: Of the start model, on the validation split.
        validation: At the end.
        test: At the end; None if the job's split is validation.
        routing_change: The share of the start model's selections that are no longer made, on held-out text.
        seconds: The steps alone.
    """

    job: Job
    before: float
    validation: float
    test: float | None
    routing_change: float
    seconds: float

    @property
    def loss(self) -> float:
        """On the job's split."""
        return self.validation if self.test is None else self.test


def parse(fields: dict[str, Any]) -> Result:
    """From JSON."""
    return Result(**{**fields, "job": Job(**fields["job"])})


def prepare(name: str, size: Planned, folder: Path, console: Console) -> None:
    """Make a start model, and the texts as it reads them, unless they are there."""
    made_of = size.starts["dense" if name == UP_CYCLED else name]
    place = _place(name, folder)
    start.prepare(made_of, place, "cpu", console)
    tokenizer = start.load_corpus(place).tokenizer
    for kind in TEXTS:
        file = place / f"{kind}.pickle"
        if not file.exists():
            file.write_bytes(pickle.dumps(token_ids(kind, tokenizer, size.texts)))


def run(job: Job, arm: Arm, size: Planned, folder: Path) -> Result:
    """Train from the start model as the arm does."""
    model, task = load(job.start, size, folder), task_of(job, size, folder)
    before = selected_experts(model, task.probe)
    with training(model, arm, job.rate) as groups:
        trained = train(model, task, groups, evaluations=1)
    return Result(
        job=job,
        before=trained.curve[0][1],
        validation=trained.curve[-1][1],
        test=None if job.split == "validation" else evaluate(model, task, job.split),
        routing_change=routing_change(before, selected_experts(model, task.probe)),
        seconds=trained.seconds,
    )


def load(name: str, size: Planned, folder: Path) -> Any:
    """A start model, as `prepare` left it."""
    model = start.load_model(_place(name, folder), "cpu")
    if name != UP_CYCLED:
        return model
    like = size.starts["16 experts"]
    return upcycle(model, like.experts, like.top_k)


def task_of(job: Job, size: Planned, folder: Path) -> Task:
    """The job's text with the order that its seed gives."""
    place = _place(job.start, folder)
    if job.text == DOCSTRINGS:
        return Docstrings(start.load_corpus(place), size.starts[job.start], job.seed, "cpu")
    return Language(texts_of(job.text, job.start, folder), size, job.steps, job.seed)


def texts_of(text: str, start_model: str, folder: Path) -> dict[str, Tensor]:
    """The token ids of each split, [tokens], as a start model reads them."""
    return _ids(text, _place(start_model, folder))


@functools.cache
def _ids(text: str, place: Path) -> dict[str, Tensor]:
    if text != MIXED:
        ids: dict[str, Tensor] = pickle.loads((place / f"{text}.pickle").read_bytes())
        return ids
    corpus = start.load_corpus(place)
    middle = len(corpus.unseen) // 2
    python = {"train": corpus.pretraining, "validation": corpus.unseen[:middle], "test": corpus.unseen[middle:]}
    kinds = [python, *(_ids(kind, place) for kind in TEXTS)]
    return {split: _as_much_of_each([kind[split] for kind in kinds]) for split in python}


def _as_much_of_each(texts: list[Tensor]) -> Tensor:
    length = min(map(len, texts))
    return torch.cat([text[:length] for text in texts])


def _place(name: str, folder: Path) -> Path:
    """That of the first start model is the one of post-training."""
    return folder / {"16 experts": "start", UP_CYCLED: "start-dense"}.get(name, f"start-{name.replace(' ', '-')}")
