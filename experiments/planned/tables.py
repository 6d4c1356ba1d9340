"""What came out of the experiment that was decided beforehand, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from common.markdown import interval, markdown
from common.significance import mean_interval
from planned.arms import FROZEN_START
from planned.comparisons import Compared, stands
from planned.parts import PARTS
from planned.runs import Runs
from post_training.tables import percent


def whole(parts: Sequence[Runs], compared: Sequence[Compared]) -> str:
    """All tables, of the settings that have all their runs."""
    found = []
    for runs in parts:
        found.append(f"## {runs.part.title}")
        done = [setting for setting in runs.part.settings if runs.done(setting)]
        found += [
            f"Not finished, so nothing is said of it: {', '.join(s)}." for s in runs.part.settings if s not in done
        ]
        if not done:
            continue
        if runs.gated:
            found.append(gate(runs))
        for setting in done:
            found += [f"**{', '.join(setting)}**, loss on the test split in nats/token", arms(runs, setting)]
        found += ["**Differences**, paired by seed", differences([one for one in compared if one.part == runs.name])]
        if any(runs.tuned(setting, arm) for setting in done for arm in runs.arms()):
            found += ["**Tuning**, loss on the validation split; the chosen rate is bold", tuning(runs, done)]
    missing = [part.title for name, part in PARTS.items() if name not in {runs.name for runs in parts}]
    found += [f"## {title}\n\nNot run." for title in missing]
    standing = ", ".join(f"`{arm}`" for arm in stands(compared)) or "none"
    found.append("## What stands")
    found.append(f"Training routers alone stands, by the plan's criterion, for: {standing}.")
    found.append(f"p is corrected (Holm) for all {len(compared)} comparisons here.")
    return "\n\n".join(found) + "\n"


def arms(runs: Runs, setting: tuple[str, str]) -> str:
    """Every arm of one setting."""
    rows = []
    for arm in runs.arms():
        results = runs.results(setting, arm)
        losses = [result.loss for result in results]
        loss = f"{losses[0]:.4f}" if arm == FROZEN_START else interval(mean_interval(losses), ".4f")
        rows.append(
            [
                arm,
                f"{results[0].job.rate:g}",
                str(results[0].job.steps),
                loss,
                percent([result.routing_change for result in results]),
                f"{fmean(result.seconds for result in results):.1f}",
            ]
        )
    return markdown(["Arm", "Learning rate", "Steps", "Loss", "Selections lost", "Seconds a run"], rows)


def differences(compared: Sequence[Compared]) -> str:
    """Every comparison, with what it says."""
    rows = [
        [
            ", ".join(one.setting),
            f"{one.arm} less {one.base}",
            interval(one.test.difference, "+.4f"),
            f"{one.test.p:.2g}",
            f"{one.corrected:.2g}",
            one.verdict,
            interval(one.validation.difference, "+.4f"),
        ]
        for one in compared
    ]
    return markdown(["Setting", "What", "Difference", "p", "p, Holm", "Verdict", "On the validation split"], rows)


def tuning(runs: Runs, settings: Sequence[tuple[str, str]]) -> str:
    """The loss at every learning rate that was tried."""
    grids = {
        (setting, arm): losses for setting in settings for arm in runs.arms() if (losses := runs.tuned(setting, arm))
    }
    rates = sorted({rate for losses in grids.values() for rate in losses})
    rows = []
    for (setting, arm), losses in grids.items():
        best = min(losses, key=lambda rate: losses[rate])
        cells = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates]
        rows.append(
            [", ".join(setting), arm, *(f"**{c}**" if r == best else c for r, c in zip(rates, cells, strict=True))]
        )
    return markdown(["Setting", "Arm", *(f"{rate:g}" for rate in rates)], rows)


def gate(runs: Runs) -> str:
    """Whether a frozen random router is worse than a trained one at all."""
    errors = runs.gate()
    verdict = "so the other arms were run" if runs.passed() else "so the part stops here"
    return f"Conventional training is below a frozen random router by {errors:.1f} standard errors, {verdict}."
