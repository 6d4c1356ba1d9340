"""The experiment that was decided beforehand: that it does what its plan says, in small."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from common.kept import Kept
from common.options import console_for
from planned import schedule
from planned.arms import EQUAL_TIME, ROUTER_ONLY, ROUTER_RATE, UP_CYCLED, training
from planned.comparisons import compare, stands
from planned.language import Language
from planned.parts import PARTS
from planned.running import Job, load, parse, task_of
from planned.sizes import PLANNED
from planned.tables import whole
from planned.texts import TEXTS, token_ids
from post_training.arms import BASELINE
from torch import Tensor

OUTCOME = Path(__file__).parents[2] / "experiments" / "outcome"
SIZE = PLANNED["tiny"]
SETTING = ("16 experts", next(iter(TEXTS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, experiment: Callable[..., str]) -> Path:
    """After all parts have been run."""
    folder = tmp_path_factory.mktemp("planned")
    experiment("--part", *PARTS, "--output", folder)
    return folder


class Here(Executor):
    """Runs at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


def test_every_part_has_all_its_runs(folder: Path) -> None:
    parts = {runs.name: runs for runs in schedule.kept_parts(SIZE, folder)}
    assert list(parts) == list(PARTS)
    for runs in parts.values():
        assert runs.missing() == []
    alone = parts["router-only"]
    for setting in alone.part.settings:
        for arm in ROUTER_ONLY:
            assert alone.complete(setting, arm)
        start = alone.losses(setting, "frozen start")
        assert len({*start}) == 1
        assert {result.routing_change for result in alone.results(setting, "frozen start")} == {0}
        assert all(loss != start[0] for loss in alone.losses(setting, BASELINE))


def test_writes_tables_and_plot(folder: Path) -> None:
    parts = schedule.kept_parts(SIZE, folder)
    compared = compare(parts)
    # Seven in each of four settings, eight of learning rates, and behind the gate one or three.
    assert len(compared) - 36 == (3 if parts[-1].passed() else 1)
    text = (folder / "planned.md").read_text()
    assert text == whole(parts, compared)
    assert text.count("centered, budget 1/32 less conventional, equal time") == 4
    assert f"all {len(compared)} comparisons" in text
    assert (folder / "planned.png").read_bytes().startswith(b"\x89PNG")


def test_a_look_beforehand_beside_what_training_showed(folder: Path, experiment: Callable[..., str]) -> None:
    experiment("--part", "preflight", "--output", folder)
    parts = schedule.kept_parts(SIZE, folder)
    table, verdicts = (folder / "preflight.md").read_text().strip().split("\n\n")
    compared = [one for one in compare(parts) if (one.arm, one.base) == ("centered", BASELINE)]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == [
        ", ".join(one.setting) for one in compared
    ]
    for one, row, verdict in zip(compared, table.splitlines()[2:], verdicts.splitlines(), strict=True):
        assert f"{one.test.difference.mean:+.4f} [" in row
        assert verdict.startswith(f"- **{', '.join(one.setting)}**: routers would")


def test_the_published_tables_are_those_of_the_published_runs() -> None:
    parts = schedule.kept_parts(PLANNED["small"], OUTCOME)
    assert whole(parts, compare(parts)) == (OUTCOME / "planned.md").read_text()


def test_what_was_interrupted_goes_on_where_it_stopped(folder: Path) -> None:
    file = folder / "planned.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:-9])  # in the middle of writing the last line but one
    schedule.run_parts(PARTS, SIZE, folder, Here(), console_for())
    again = file.read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2]
    old, new = ({str(run["job"]): run for run in map(json.loads, some[-2:])} for some in (lines, again))
    assert old.keys() == new.keys()
    for job, run in old.items():
        for name in ("before", "validation", "test"):  # in another process, sums may be rounded in another way
            assert new[job][name] == pytest.approx(run[name], rel=1e-4)
    schedule.run_parts(PARTS, SIZE, folder, Here(), console_for())
    assert file.read_text().splitlines(keepends=True) == again


def test_nothing_is_said_of_a_setting_without_all_its_runs(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "planned.jsonl").read_text().splitlines(keepends=True)
    unfinished = '"start": "32 experts", "text": "documentation", "arm": "centered", "rate"'
    last = max(number for number, line in enumerate(lines) if unfinished in line)
    (tmp_path / "planned.jsonl").write_text("".join(lines[:last]))
    (tmp_path / "step_times.json").write_text((folder / "step_times.json").read_text())
    parts = schedule.kept_parts(SIZE, tmp_path)
    assert [runs.name for runs in parts] == ["router-only"]
    compared = compare(parts)
    assert len(compared) == 21
    assert ("32 experts", "documentation") not in {one.setting for one in compared}
    text = whole(parts, compared)
    assert "nothing is said of it: 32 experts, documentation." in text
    assert text.count("Not run.") == 2
    assert stands(compared) == []


def test_runs_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="another size"):
        Kept(folder / "planned.jsonl", dataclasses.asdict(PLANNED["small"]), parse)


@pytest.mark.parametrize("arms", [ROUTER_ONLY, ROUTER_RATE, UP_CYCLED], ids=["alone", "rate", "up-cycled"])
def test_arms_train_what_they_say(folder: Path, arms: dict[str, object]) -> None:
    """A step moves routers, the other weights, or none, and no arm's forward is another."""
    moved, losses = {}, set()
    for name, arm in arms.items():
        model = load("16 experts", SIZE, folder)
        before = {key: weight.clone() for key, weight in model.state_dict().items()}
        task = task_of(Job("", *SETTING, name, 0.0, 1, 100, "test"), SIZE, folder)
        with training(model, arm, rate=1e-2) as groups:
            optimizer = torch.optim.SGD(groups)
            loss = task.loss(model, 0)
            if any(weight.requires_grad for weight in model.parameters()):
                loss.backward()
            optimizer.step()
        losses.add(loss.item())
        moved[name] = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    assert len(losses) == 1
    routers = {key for key in before if key.endswith("mlp.gate.weight")}
    for name, arm in arms.items():
        assert bool(moved[name] & routers) == arm.routers
        assert moved[name] >= routers or not arm.routers
        assert bool(moved[name] - routers) == arm.others


def test_arms_of_routers_alone_differ_in_the_routers_gradient_alone(folder: Path) -> None:
    gradients: dict[str, Tensor] = {}
    for name in ROUTER_ONLY:
        if not ROUTER_ONLY[name].routers:
            continue
        model = load("16 experts", SIZE, folder)
        task = task_of(Job("", *SETTING, name, 0.0, 1, 100, "test"), SIZE, folder)
        with training(model, ROUTER_ONLY[name], rate=1.0) as (others, routers):
            task.loss(model, 0).backward()
            assert all(weight.grad is None for weight in others["params"])
            gradients[name] = torch.cat([weight.grad.flatten() for weight in routers["params"]])
    assert torch.equal(gradients[BASELINE], gradients[EQUAL_TIME])
    others = [name for name in gradients if name != EQUAL_TIME]
    assert all(not torch.equal(gradients[a], gradients[b]) for a, b in itertools.combinations(others, 2))


def test_up_cycled_experts_share_half_of_the_dense_network(folder: Path) -> None:
    model, dense = load("up-cycled", SIZE, folder), load("dense", SIZE, folder)
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        gate_up, whole = layer.mlp.experts.gate_up_proj, source.mlp.experts.gate_up_proj
        width = gate_up.shape[1] // 2
        kept = (gate_up == whole).all(-1)
        assert torch.equal(kept[:, :width], kept[:, width:])
        assert (kept[:, :width].sum(1) == width // 2).all()
        down = layer.mlp.experts.down_proj == source.mlp.experts.down_proj
        assert torch.equal(down.all(1), kept[:, :width])
        assert len({tuple(row.tolist()) for row in kept}) > 1
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)


def test_more_steps_begin_with_the_same_batches(folder: Path) -> None:
    few, many = (task_of(Job("", *SETTING, "", 0.0, steps, 100, "test"), SIZE, folder) for steps in (2, 5))
    other = task_of(Job("", *SETTING, "", 0.0, 2, 101, "test"), SIZE, folder)
    model = load("16 experts", SIZE, folder)
    assert isinstance(few, Language)
    losses = [[task.loss(model, step).item() for step in range(2)] for task in (few, many, other)]
    assert losses[0] == losses[1] != losses[2]


class Letters:
    """As much of a tokenizer as texts ask for: a token a character."""

    eos_token_id = -1

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@pytest.mark.parametrize("kind", TEXTS)
def test_no_text_is_in_two_splits(kind: str) -> None:
    texts = {
        split: {text for text in "".join("\0" if i < 0 else chr(i) for i in ids.tolist()).split("\0") if text}
        for split, ids in token_ids(kind, Letters(), 60).items()
    }
    assert sum(map(len, texts.values())) == 60
    assert all(texts.values())
    assert all(texts[a].isdisjoint(texts[b]) for a, b in itertools.combinations(texts, 2))
