"""The experiment as a user runs it, at the smallest size, and the parts that its conclusions rest on."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common.kept import Kept
from common.significance import holm, mean_interval, paired
from common.sizes import SIZES
from post_training.arms import ARMS, attached
from post_training.schedule import chosen_rates, tuning_jobs
from post_training.statements import draw, ending_tokens, log_likelihoods, until_end
from post_training.training import TASKS, Job, Result, parse
from scipy import stats
from start import model as start
from start.corpus import Corpus
from start.verifier import reward

SIZE = SIZES["tiny"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, experiment: Callable[..., str]) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    printed = experiment("--part", "post-training", "--output", folder, "--arms", "conventional", "densemixer")
    assert "Total time" in printed
    return folder


@pytest.fixture(scope="module")
def corpus(output: Path) -> Corpus:
    return start.load_corpus(output / "start")


def test_writes_every_run(output: Path) -> None:
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    tuning = [row for row in rows if row["split"] == "validation"]
    final = [row for row in rows if row["split"] == "test"]
    assert len(tuning) == 2 * 2 * len(SIZE.sft_rates) * SIZE.tuning_seeds
    assert {(row["task"], row["arm"], row["seed"]) for row in final} == {
        (task, arm, str(seed)) for task in TASKS for arm in ("conventional", "densemixer") for seed in range(SIZE.seeds)
    }
    assert {row["seed"] for row in tuning}.isdisjoint(row["seed"] for row in final)
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert len(runs) == len(rows)
    for run in runs:
        added = run["share_unselected"] > 0
        assert added == (run["job"]["arm"] == "densemixer" and run["router_gradient"] > 0)
    assert any(run["share_unselected"] > 0 for run in runs)


def test_every_run_is_kept(output: Path) -> None:
    """What a run says is the same after it was written and read."""
    rows = json.loads((output / "results.json").read_text())["runs"]
    common = {**dataclasses.asdict(SIZE), "device": "cpu"}
    kept = Kept(output / "post_training.jsonl", common, parse)
    assert {job: dataclasses.asdict(kept[job]) for job in kept.jobs} == {
        Job(**row["job"]): {**row, "curve": [tuple(point) for point in row["curve"]]} for row in rows
    }


def test_writes_tables_and_plots(output: Path) -> None:
    text = (output / "results.md").read_text()
    assert all(kind.title in text for kind in TASKS.values())
    assert "Difference from conventional" in text
    for name in ("post_training.png", "tuning.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", TASKS)
def test_data_follow_from_the_seed_alone(corpus: Corpus, task: str) -> None:
    """The loss of each step at equal weights is that of its data (and draws): the same, whatever the arm."""
    losses = {}
    for arm in ARMS:
        model = start.small_model(SIZE, corpus.tokenizer)
        tasks = [TASKS[task].make(corpus, SIZE, seed, "cpu") for seed in (0, 1)]
        with attached(model, arm):
            losses[arm] = [[one.loss(model, step).item() for step in range(one.steps)] for one in tasks]
    assert all(found == losses["conventional"] for found in losses.values())
    if task == "sft":  # a model without training earns no reward, so its losses are zero
        assert losses["conventional"][0] != losses["conventional"][1]


def test_frozen_routers_stay(corpus: Corpus) -> None:
    model = start.small_model(SIZE, corpus.tokenizer)
    router = model.model.layers[0].mlp.gate.weight
    for arm in ARMS:
        with attached(model, arm):
            assert router.requires_grad == (arm != "frozen router")
        assert router.requires_grad


def test_splits_share_no_example(corpus: Corpus) -> None:
    docstrings = [{tuple(example.ids) for example in corpus.docstrings[split]} for split in corpus.docstrings]
    contexts = [{tuple(prompt.ids) for prompt in corpus.prompts[split]} for split in corpus.prompts]
    for train, validation, test in (docstrings, contexts):
        assert train
        assert validation
        assert test
        # Files differ, but the library repeats itself here and there.
        assert len(test & train) <= 0.05 * len(test)
    assert all(len(prompt.ids) == SIZE.rl_prompt for prompt in corpus.prompts["train"])


def test_shared_prompts_have_the_gradient_of_repeated_ones(corpus: Corpus) -> None:
    model = start.small_model(SIZE, corpus.tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([prompt.ids for prompt in corpus.prompts["train"][:2]])
    completions = draw(model, prompts, 3, 5, generator)
    together = log_likelihoods(model, prompts, completions)
    together.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    whole = torch.cat([prompts.repeat_interleave(3, 0), completions], 1)
    logits = model(input_ids=whole, use_cache=False).logits[:, prompts.shape[1] - 1 : -1]
    apart = logits.log_softmax(-1).gather(-1, completions[..., None]).squeeze(-1)
    apart.sum().backward()
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_completions_count_up_to_their_end(corpus: Corpus) -> None:
    ends = ending_tokens(corpus.tokenizer)
    line_break, letter = (corpus.tokenizer(text)["input_ids"][0] for text in ("\n", "a"))
    assert ends[line_break]
    assert not ends[letter]
    completions = torch.tensor([[letter, line_break, letter, line_break], [letter, letter, letter, letter]])
    assert until_end(completions, ends).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


CONTEXT = "def mean(values, weights):\n    total = sum(weights)\n    "


@pytest.mark.parametrize(
    ("begun", "completion", "expected"),
    [
        ("return sum(", "values) / total\n", 1),
        ("return sum(", "values) / total", 0),  # doesn't end
        ("return sum(", "values / total\n", 0),  # doesn't parse
        ("return sum(", "numbers) / total\n", 0),  # unknown name
        ("return sum(", ")\n", 0),  # adds no name
        ("return sum(", "values)\nnonsense here (", 1),  # only the line counts
        ("return sum(", "len(values))\n", 1),  # a builtin
        ("return sum(", "values).real\n", 1),  # an attribute is free
        ("return sum(v", "alues)\n", 0),  # the name is known, but none begins in the completion
        ("return sum(v", "alues) / total\n", 1),
        ("return sum(val", ") / total\n", 0),  # what is known is `values`, not its beginning
        ("total = ", "total; values\n", 0),  # two statements
        ('total = "ä" + ', "weights\n", 1),  # ast counts bytes
        ("total = ", "\0\n", 0),
    ],
)
def test_verifier(begun: str, completion: str, expected: float) -> None:
    assert reward(CONTEXT, begun, completion) == expected


def test_statistics() -> None:
    values, base = [2.1, 2.5, 2.2, 2.9, 2.4], [2.0, 2.2, 2.3, 2.5, 2.1]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    comparison = paired(values, base)
    differences = [a - b for a, b in zip(values, base, strict=True)]
    assert comparison.difference.mean == pytest.approx(sum(differences) / 5)
    assert comparison.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert paired(values, values).p == 1


def test_holm() -> None:
    # The example of Holm's procedure: ascending p times 4, 3, 2, 1, each at least the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]


def test_learning_rates_are_chosen_alike_for_all_arms() -> None:
    jobs = tuning_jobs(SIZE)
    grids = {arm: [(job.task, job.learning_rate, job.seed) for job in jobs if job.arm == arm] for arm in ARMS}
    assert all(grid == grids["conventional"] for grid in grids.values())
    assert {job.split for job in jobs} == {"validation"}

    def result(task: str, rate: float, metric: float) -> Result:
        return Result(Job(task, "densemixer", rate, 0, "validation"), metric, [], 0, 0, 0, 0)

    results = [result("sft", 1.0, 3.0), result("sft", 2.0, 2.0), result("rl", 1.0, 0.3), result("rl", 2.0, 0.2)]
    assert chosen_rates(results) == {("sft", "densemixer"): 2.0, ("rl", "densemixer"): 1.0}
