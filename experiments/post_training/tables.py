"""What came out, as Markdown and as CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from common.markdown import interval, markdown
from common.significance import Comparison, Interval, holm, mean_interval, paired
from post_training.arms import BASELINE
from post_training.schedule import chosen_rates, tuned
from post_training.training import TASKS, Job, Result


class Outcome(NamedTuple):
    """An arm on one task: its mean over seeds, and how it compares with conventional training (None for that itself).

    Attributes:
        corrected: The p-value, corrected for all comparisons of the experiment.
    """

    task: str
    arm: str
    metric: Interval
    against: Comparison | None
    corrected: float | None


def outcomes(results: Iterable[Result]) -> list[Outcome]:
    """Every task and arm, on the test split."""
    final = _final(results)
    found = []
    for task, arm in final:
        values, base = ([run.metric for run in final[task, name]] for name in (arm, BASELINE))
        against = None if arm == BASELINE else paired(values, base)
        found.append(Outcome(task, arm, mean_interval(values), against, None))
    compared = [outcome for outcome in found if outcome.against]
    corrected = dict(zip(compared, holm([o.against.p for o in compared if o.against]), strict=True))
    return [outcome._replace(corrected=corrected.get(outcome)) for outcome in found]


def results_table(results: Sequence[Result]) -> str:
    """The held-out metric of every arm, and its paired difference from conventional training."""
    final, rates = _final(results), chosen_rates(results)
    starts = {task: fmean(run.curve[0][1] for run in runs) for (task, _), runs in final.items()}
    parts = []
    for task, kind in TASKS.items():
        better = "higher" if kind.higher_is_better else "lower"
        rows = []
        for outcome in outcomes(results):
            if outcome.task != task:
                continue
            difference, p, corrected = "–", "–", "–"
            if outcome.against and outcome.corrected is not None:
                difference = interval(outcome.against.difference, "+.4f")
                p, corrected = f"{outcome.against.p:.3f}", f"{outcome.corrected:.3f}"
            rate = f"{rates[task, outcome.arm]:g}"
            rows.append([outcome.arm, rate, interval(outcome.metric, ".4f"), difference, p, corrected])
        head = ["Arm", "Learning rate", "Test metric", "Difference from conventional", "p", "p, Holm"]
        seeds = len(final[task, BASELINE])
        parts.append(
            f"**{kind.title}** ({kind.metric}, {better} is better; {seeds} seeds; the start model has "
            f"{starts[task]:.4f} on the validation split)\n\n" + markdown(head, rows)
        )
    return "\n\n".join(parts)


def routing_table(results: Iterable[Result]) -> str:
    """What each arm does to the routers, and what its steps take."""
    rows = []
    for (task, arm), runs in _final(results).items():
        rows.append(
            [
                TASKS[task].title.partition(":")[0],
                arm,
                percent([run.routing_change for run in runs]),
                f"{fmean(run.router_gradient for run in runs):.3g}",
                percent([run.share_unselected for run in runs]),
                f"{fmean(run.seconds for run in runs):.1f}",
            ]
        )
    head = ["Task", "Arm", "Selections lost since the start", "Router gradient", "From unselected", "Seconds a run"]
    return markdown(head, rows)


def tuning_table(results: Iterable[Result]) -> str:
    """The validation metric of every learning rate; the chosen one is bold."""
    results = list(results)
    chosen = chosen_rates(results)
    parts = []
    for task, kind in TASKS.items():
        grids = {arm: rates for (name, arm), rates in tuned(results).items() if name == task}
        rates = sorted({rate for grid in grids.values() for rate in grid})
        rows = [
            [
                arm,
                *(
                    f"**{fmean(grid[rate]):.4f}**" if rate == chosen[task, arm] else f"{fmean(grid[rate]):.4f}"
                    for rate in rates
                ),
            ]
            for arm, grid in grids.items()
        ]
        parts.append(f"**{kind.title}** ({kind.metric})\n\n" + markdown(["Arm", *(f"{r:g}" for r in rates)], rows))
    return "\n\n".join(parts)


def write_csv(results: Iterable[Result], path: Path) -> None:
    """One line a run."""
    measures = ("metric", "routing_change", "router_gradient", "share_unselected", "seconds")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(field.name for field in dataclasses.fields(Job)), *measures])
        for result in results:
            writer.writerow([*dataclasses.astuple(result.job), *(f"{getattr(result, name):.6g}" for name in measures)])


def percent(values: Sequence[float]) -> str:
    """The mean of shares."""
    return f"{100 * fmean(values):.1f} %"


def _final(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """The runs of the experiment itself by task and arm, each in the order of the seeds."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in sorted((r for r in results if r.job.split == "test"), key=lambda r: r.job.seed):
        found.setdefault((result.job.task, result.job.arm), []).append(result)
    return dict(sorted(found.items(), key=lambda item: list(TASKS).index(item[0][0])))
