"""What `densemixer preflight` says of each setting before it is trained, beside what training then showed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.markdown import interval, markdown
from planned.comparisons import compare
from planned.running import load, prepare, task_of
from planned.runs import Runs
from planned.sizes import Planned
from post_training.arms import BASELINE
from post_training.tables import percent
from rich.console import Console

from densemixer_adapters.preflight import preflight

ARM = "centered"
"""Of which the verdict speaks, where weights are renormalised as here."""
BATCHES = 8
"""Of the first steps, at most."""
MEAN_OF_SCHEDULE = 0.5
"""Of a warmup to the learning rate and a cosine to zero."""
HEAD = (
    "Setting",
    "Cosine of halves: conventional",
    "densemixer",
    "centered",
    "Best swaps, nats a token",
    "Selections lost, predicted",
    "measured",
    "centered less conventional, measured",
    "What that is",
)


def compare_with_training(parts: Sequence[Runs], size: Planned, folder: Path, console: Console) -> str:
    """A table and the verdicts, of the settings that have all their runs. Takes seconds for each."""
    runs_of = {runs.name: runs for runs in parts}
    rows, verdicts = [], []
    for one in compare(parts):
        if (one.arm, one.base) != (ARM, BASELINE):
            continue
        runs, setting, name = runs_of[one.part], one.setting, ", ".join(one.setting)
        job = runs.finals(setting, ARM)[0]
        prepare(job.start, size, folder, console)
        task = task_of(job, size, folder)
        found = preflight(
            load(job.start, size, folder).train(),
            [task.batch(step) for step in range(min(BATCHES, task.steps))],
            steps=task.steps,
            learning_rate=MEAN_OF_SCHEDULE * job.rate,
        )
        rows.append(
            [
                name,
                *(f"{found.estimators[arm].agreement.whole:.2f}" for arm in (BASELINE, "densemixer", ARM)),
                f"{found.best_swap.whole:.2f}",
                percent([found.estimators[ARM].change.whole]),
                percent([result.routing_change for result in runs.results(setting, ARM)]),
                interval(one.test.difference, "+.4f"),
                one.verdict,
            ]
        )
        verdicts.append(f"- **{name}**: {found.verdict.text}.")
    return "\n\n".join([markdown(HEAD, rows), "\n".join(verdicts)]) + "\n"
