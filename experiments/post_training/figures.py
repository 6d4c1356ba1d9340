"""The plots of post-training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from common.significance import mean_interval
from matplotlib.figure import Figure
from post_training.arms import ARMS
from post_training.schedule import tuned
from post_training.tables import outcomes
from post_training.training import TASKS, Result

COLOURS = dict(zip(ARMS, ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))


def draw(results: Sequence[Result], folder: Path) -> None:
    """post_training.png: curves and paired differences; tuning.png: the metric by learning rate."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    for (curves, differences), task in zip(figure.subplots(2, 2), TASKS, strict=True):
        runs = [result for result in results if result.job.task == task and result.job.split == "test"]
        for arm in dict.fromkeys(result.job.arm for result in runs):
            series = zip(*(result.curve for result in runs if result.job.arm == arm), strict=True)
            points = [(moments[0][0], mean_interval([value for _, value in moments])) for moments in series]
            steps = [step for step, _ in points]
            curves.plot(steps, [value.mean for _, value in points], color=COLOURS[arm], marker="o", ms=3, label=arm)
            lows, highs = ([getattr(value, bound) for _, value in points] for bound in ("low", "high"))
            curves.fill_between(steps, lows, highs, color=COLOURS[arm], alpha=0.12, linewidth=0)
        curves.set(title=TASKS[task].title, xlabel="optimizer steps", ylabel=f"{TASKS[task].metric}, validation")
        curves.grid(alpha=0.3)
        curves.legend()

        compared = [outcome for outcome in outcomes(results) if outcome.task == task and outcome.against]
        for place, outcome in enumerate(compared):
            assert outcome.against is not None
            mean, low, high = outcome.against.difference
            error = [[mean - low], [high - mean]]
            differences.errorbar(mean, place, xerr=error, fmt="o", capsize=4, color=COLOURS[outcome.arm])
        differences.axvline(0, color="black", linewidth=0.8)
        differences.set_yticks(range(len(compared)), [outcome.arm for outcome in compared])
        differences.set_ylim(len(compared) - 0.5, -0.5)
        better = "right" if TASKS[task].higher_is_better else "left"
        differences.set(
            title="Difference from conventional, test split",
            xlabel=f"{TASKS[task].metric}; better is to the {better}",
        )
        differences.grid(alpha=0.3, axis="x")
    figure.suptitle("Mean over seeds with 95 % confidence intervals; differences are paired by seed")
    figure.savefig(folder / "post_training.png", dpi=90)
    _draw_tuning(results, folder)


def _draw_tuning(results: Iterable[Result], folder: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    grids = tuned(results)
    for axes, task in zip(figure.subplots(1, 2), TASKS, strict=True):
        for (name, arm), rates in grids.items():
            if name == task:
                means = [fmean(rates[rate]) for rate in sorted(rates)]
                axes.plot(sorted(rates), means, color=COLOURS[arm], marker="o", ms=4, label=arm)
        axes.set_xscale("log")
        axes.set(title=TASKS[task].title, xlabel="learning rate", ylabel=f"{TASKS[task].metric}, validation")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(folder / "tuning.png", dpi=90)
