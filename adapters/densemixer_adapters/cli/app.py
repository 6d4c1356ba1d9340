"""The command ``densemixer``, and those of its commands that say something."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from densemixer_adapters.cli.columns import columns
from densemixer_adapters.cli.doctor import DISTRIBUTION, Check, examine
from densemixer_adapters.cli.launch import run, setup
from densemixer_adapters.cli.preflight import preflight
from densemixer_adapters.cli.printable import printable, say
from densemixer_adapters.cli.reading import not_a_folder, reading
from densemixer_adapters.cli.worth import ESTIMATORS, WHAT_COSINES_ARE, cosines

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

COST_HEADS = (
    "\nbudget",
    "DenseMixer adds,\nGFLOP a token",
    "step time,\nat the same speed",
    "the same,\ncheckpointed",
    "kept until\nthe backward",
    "the same,\ncheckpointed",
    *(f"{estimator}:\ncosine" for estimator in ESTIMATORS),
)
SELFTEST_CHECKS = (
    "Of products, kernel, gradients, compile, 'expert parallelism', ways, speed. All of them if none is named."
)
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version(DISTRIBUTION))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """DenseMixer in training frameworks."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """Say what is installed, which hooks are live, which versions are supported, and what to do about each problem.

    The exit status is 1 if there is a problem, otherwise 0.
    """
    checks = examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        typer.echo(columns([_row(check) for check in checks]))
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


def _row(check: Check) -> tuple[str | Text, ...]:
    fix = f"\nfix: {printable(check.fix)}" if check.fix else ""
    return Text(check.state, COLOURS[check.state]), printable(check.name), printable(check.detail) + fix


Checkpoint = Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="Folder of a checkpoint, or its id on the hub.")]


@app.command()
def inspect(
    checkpoint: Checkpoint, as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False
) -> None:
    """Say what DenseMixer would do with a model: its layers, experts and routers, and how to train these with LoRA.

    Reads the configuration alone, no weights. The exit status is 1 if the model isn't supported, 2 if it can't be read.
    """
    with reading(f"the configuration of {checkpoint}", not_a_folder(checkpoint)):
        from densemixer_adapters.cli.inspection import build_empty, inspect_model

        report = inspect_model(build_empty(checkpoint))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    elif not report.supported:
        say(f"{report.model} ({report.model_type}): not supported", report.reason)
    else:
        others = f", and {report.without_weights} without weights" if report.without_weights else ""
        weights = "renormalised over the selected experts" if report.renormalised else "not renormalised"
        say(f"{report.model} ({report.model_type}): supported")
        rows = [
            ("layers", f"{len(report.layers)}: {report.layers[0]} to {report.layers[-1]}"),
            ("experts", f"{report.experts}{others}, of which a token goes through {report.selected}"),
            ("router", f"{report.router}: {report.score}, {weights}"),
            ("LoRA", f"modules_to_save={list(report.modules_to_save)} trains the routers in full,"),
            ("", f"target_parameters={list(report.target_parameters)} through an adapter"),
        ]
        typer.echo(columns([(name, printable(text)) for name, text in rows]))
    if not report.supported:
        raise typer.Exit(1)


@app.command()
def cost(
    checkpoint: Checkpoint,
    sequence: Annotated[int, typer.Option("--seq-len", min=1, max=1 << 40, help="Tokens of a sequence.")] = 4096,
    budgets: Annotated[
        list[float], typer.Option("--budget", help="The option `budget` of DenseMixer; may be given several times.")
    ] = [1.0, 0.125, 0.0625, 0.03125],  # noqa: B006  # typer's way; it isn't changed
    ep: Annotated[int, typer.Option("--ep", min=1, help="Ranks that the experts are spread over.")] = 1,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that have the same tokens (tensor parallelism).")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Estimate what DenseMixer costs for a model: operations, bytes kept, and a step's time over a conventional one's.

    And what one step's extra gradient was worth in layers that were measured. With --ep or --tp also the bytes that a
    rank sends. Reads the configuration alone. The formulas are in densemixer_adapters/cli/inspection.py and
    collectives.py. The exit status is 1 if the model isn't supported, 2 if it can't be read.
    """
    from densemixer_adapters.errors import UnsupportedModelError
    from densemixer_core import DenseMixerConfig

    try:
        configs = [DenseMixerConfig(budget=budget) for budget in budgets]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        with reading(f"the configuration of {checkpoint}", not_a_folder(checkpoint)):
            from densemixer_adapters.cli.inspection import build_empty, estimate

            model = build_empty(checkpoint)
            found = [estimate(model, sequence, config, ep, tp) for config in configs]
    except UnsupportedModelError as error:
        say(f"densemixer cost: {error}", err=True)
        raise typer.Exit(1) from None
    forward = found[0].forward
    if as_json:
        settings = [
            {
                "budget": budget,
                **dataclasses.asdict(one),
                "step_time": one.ratio(),
                "step_time_checkpointed": one.ratio(checkpointed=True),
            }
            for budget, one in zip(budgets, found, strict=True)
        ]
        typer.echo(json.dumps({"forward": forward, "settings": settings}, indent=2))
        return
    typer.echo(
        f"A token of a conventional step, in sequences of {sequence}: {3e-9 * forward:.4g} GFLOP, with gradient "
        f"checkpointing {4e-9 * forward:.4g}.\n"
    )
    rows = [
        (
            f"{budget:.4g}",
            f"{1e-9 * one.extra:.4g}",
            *(f"{one.ratio(checkpointed):.2f}x" for checkpointed in (False, True)),
            *(f"{kept} B" for kept in (one.saved, one.saved_checkpointed)),
            *cosines(budget),
        )
        for budget, one in zip(budgets, found, strict=True)
    ]
    typer.echo(columns(rows, COST_HEADS))
    typer.echo(f"\n{WHAT_COSINES_ARE}")
    if ep > 1 or tp > 1:
        sent = ", ".join(
            f"{1e-3 * one.sent:.4g} (budget {budget:.4g})" for budget, one in zip(budgets, found, strict=True)
        )
        typer.echo(f"\nA rank sends in the backward, kB a token: {sent}.")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's output folder, or its log.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for densemixer.png and densemixer.html; RUN_DIR if not given."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print verdict and numbers as JSON, and draw nothing.")
    ] = False,
) -> None:
    """Say whether DenseMixer did anything in a run, and draw its router metrics.

    Reads trainer_state.json (HF Trainer, LLaMA-Factory, TRL), of the checkpoint with the most steps if the run has none
    itself, or what verl's logger `file` wrote. What it can't read it leaves out, and says so. The exit status is 1 if
    the run has no router metrics, 2 if it can't be read, drawn or written.
    """
    from densemixer_adapters.cli.report import as_json as to_json
    from densemixer_adapters.cli.report import write
    from densemixer_adapters.cli.run_log import UnreadableRunError, read_run

    try:
        found = read_run(run_dir)
    except UnreadableRunError as error:
        say(f"densemixer report: {error}", err=True)
        raise typer.Exit(2) from None
    say(*(f"densemixer report: left out: {file}" for file in found.left_out), err=True)
    if not found.series:
        say(
            f"densemixer report: {run_dir} has no router metrics. Switch them on for the next run with the option "
            "metrics: `densemixer: {metrics: true}` in LLaMA-Factory, `dense_mixer: {metrics: true}` in Axolotl, "
            "DENSEMIXER_METRICS=1 with DENSEMIXER_ENABLED=1, callbacks=[DenseMixerCallback()] for a Trainer, "
            "+...override_config.densemixer='{metrics: true}' in verl. What Megatron-LM logs isn't read.",
            err=True,
        )
        raise typer.Exit(1)
    if as_json:
        typer.echo(to_json(found.series))
        return
    say(*(f"{one.name}: {one.verdict.text}" if one.name else one.verdict.text for one in found.series))
    try:
        written = write(found.series, output or (run_dir if run_dir.is_dir() else run_dir.parent))
    except ImportError:
        say("densemixer report: drawing needs matplotlib: pip install matplotlib; or use --json", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        say(f"densemixer report: can't write the report: {error}; choose a folder with --output", err=True)
        raise typer.Exit(2) from None
    say(f"Wrote {' and '.join(map(str, written))}.")


@app.command()
def selftest(
    checks: Annotated[list[str] | None, typer.Argument(metavar="[CHECK]...", help=SELFTEST_CHECKS)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Check on this machine that the gradients are right, and measure what a step costs. Takes two minutes or less.

    Paste what it prints into an issue. The exit status is 1 if a check failed, otherwise 0.
    """
    try:
        from densemixer_adapters.cli.selftest import about, table, watched
        from densemixer_adapters.selftest import CHECKS, run
    except ImportError as error:
        say(f"densemixer selftest: needs torch and transformers: {error}", err=True)
        raise typer.Exit(1) from None
    if unknown := [name for name in checks or () if name not in CHECKS]:
        raise typer.BadParameter(f"there is no {unknown[0]!r}; there are {', '.join(map(repr, CHECKS))}")
    outcomes = list(watched(run(checks or [*CHECKS])))
    if as_json:
        typer.echo(json.dumps({"about": about(), "outcomes": [dataclasses.asdict(one) for one in outcomes]}, indent=2))
    else:
        typer.echo(f"{table(outcomes)}\n\n{about()}")
    if any(one.state == "failed" for one in outcomes):
        raise typer.Exit(1)


app.command()(preflight)
app.command()(setup)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)
