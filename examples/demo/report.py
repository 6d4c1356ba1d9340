"""What the reader gets: a table, a picture with the curves, and the raw numbers."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from results import MEMORY_STEPS, Run
from rich.table import Table
from settings import Settings

MEMORY = {
    "cpu": "Most resident memory of the run's own process, with Python and libraries",
    "cuda": "Most GPU memory that torch had allocated at a time",
}
NOTES = """\
¹ Norm of the gradient of all router weights, on one batch of held-out rows;
  mean over {probes} moments of the run.
² |A| / (|A| + |G_conventional|), A = G_DenseMixer - G_conventional, at the
  same weights on that batch. What is in parentheses did not train the run:
  it is the share that DenseMixer would have had there.
³ Share of the expert selections at the start, on that batch, that are no
  longer made at the end.
⁴ Median over all steps: forward, backward and optimizer, no measuring.
⁵ {memory};
  read after {memory_steps} steps on the longest batch, before any measuring.

This is one seed and a short run. It shows how DenseMixer behaves and what it
costs, not whether it helps."""


def table(conventional: Run, densemixer: Run, settings: Settings) -> Table:
    """Both runs side by side; `notes` explains the marks."""
    runs = (conventional, densemixer)
    last = max(1, settings.steps // 10)
    shares = [f"{100 * fmean(m.share_unselected for m in run.measurements):.1f} %" for run in runs]
    seconds = [median(run.step_seconds) for run in runs]

    result = Table(title=f"{settings.steps} steps of fine-tuning, same start and same data")
    result.add_column()
    for run in runs:
        result.add_column(run.arm, justify="right")
    result.add_row("held-out loss before, nats/token", *(f"{run.measurements[0].held_out_loss:.4f}" for run in runs))
    result.add_row("held-out loss after", *(f"{run.measurements[-1].held_out_loss:.4f}" for run in runs))
    result.add_row(f"training loss, last {last} steps", *(f"{fmean(run.train_loss[-last:]):.4f}" for run in runs))
    result.add_section()
    result.add_row(
        "norm of the router gradient ¹",
        f"{fmean(m.gradient_conventional for m in conventional.measurements):.4f}",
        f"{fmean(m.gradient_densemixer for m in densemixer.measurements):.4f}",
    )
    result.add_row("  from unselected experts ²", f"0 % ({shares[0]})", shares[1])
    result.add_row(
        "routing changed since the start ³", *(f"{100 * run.measurements[-1].routing_change:.1f} %" for run in runs)
    )
    result.add_section()
    result.add_row("time per step ⁴", *(f"{1000 * value:.0f} ms" for value in seconds))
    result.add_row("  relative to conventional", "1.00", f"{seconds[1] / seconds[0]:.2f}")
    result.add_row("peak memory ⁵", *(f"{run.peak_mib:.0f} MiB" for run in runs))
    return result


def notes(run: Run) -> str:
    """What the table's marks mean, and what must not be read into it."""
    return NOTES.format(probes=len(run.measurements), memory=MEMORY[run.device], memory_steps=MEMORY_STEPS)


def draw(conventional: Run, densemixer: Run, settings: Settings, path: Path) -> None:
    """The curves of both runs."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    losses, held_out, gradients, shares = figure.subplots(2, 2).flat
    for run, colour, width in ((conventional, "tab:blue", 4), (densemixer, "tab:orange", 1.5)):  # both show if equal
        steps = range(1, len(run.train_loss) + 1)
        losses.plot(steps, run.train_loss, color=colour, alpha=0.25, linewidth=0.8)
        losses.plot(
            range(1, len(run.train_loss) + 1), _smooth(run.train_loss), color=colour, linewidth=width, label=run.arm
        )
        _plot(held_out, run, "held_out_loss", run.arm, color=colour, width=width)

    _plot(gradients, conventional, "gradient_conventional", "conventional", color="tab:blue")
    _plot(gradients, densemixer, "gradient_densemixer", "DenseMixer", color="tab:orange")
    _plot(
        gradients,
        densemixer,
        "gradient_conventional",
        "DenseMixer, selected experts alone",
        color="tab:orange",
        dashed=True,
    )
    _plot(shares, densemixer, "share_unselected", "DenseMixer", color="tab:orange")
    _plot(
        shares,
        conventional,
        "share_unselected",
        "conventional: what DenseMixer would add",
        color="tab:blue",
        dashed=True,
    )
    shares.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    shares.set_ylim(0, None)
    gradients.set_ylim(0, None)

    _label(losses, "Training loss (strong: running mean)", "loss, nats per completion token")
    _label(held_out, f"Held-out loss ({densemixer.held_out_examples} examples)", "loss, nats per completion token")
    _label(gradients, "Router gradient, one held-out batch", "norm over all layers, nats")
    _label(shares, "Router gradient from unselected experts", "norm of that part / sum of both parts' norms")
    figure.suptitle(
        f"Fine-tuning with and without DenseMixer (estimator: {settings.estimator}): "
        f"one seed, {settings.steps} steps, same start and data"
    )
    figure.savefig(path, dpi=150)


def _plot(axes: Axes, run: Run, field: str, label: str, color: str, width: float = 1.5, dashed: bool = False) -> None:
    """One field of a run's measurements against the steps taken."""
    axes.plot(
        [measurement.step for measurement in run.measurements],
        [getattr(measurement, field) for measurement in run.measurements],
        color=color,
        linewidth=width,
        linestyle="--" if dashed else "-",
        marker="o",
        markersize=4,
        label=label,
    )


def _smooth(values: list[float]) -> list[float]:
    """Mean over the last tenth of the run, fewer at the start."""
    window = max(1, len(values) // 10)
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _label(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()


def write_numbers(conventional: Run, densemixer: Run, settings: Settings, path: Path) -> None:
    """All measured values, and what they were measured with, as JSON."""
    numbers = {
        "settings": dataclasses.asdict(settings),
        "environment": {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "conventional": _as_dict(conventional),
        "densemixer": _as_dict(densemixer),
    }
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _as_dict(run: Run) -> dict[str, object]:
    return {**dataclasses.asdict(run), "measurements": [m._asdict() for m in run.measurements]}
