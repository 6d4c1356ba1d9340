"""The command ``densemixer``."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from densemixer_adapters import _boot
from densemixer_adapters.cli import site_hook
from densemixer_adapters.cli.doctor import DISTRIBUTION, examine
from densemixer_adapters.cli.printable import one_line, printable

app = typer.Typer(no_args_is_help=True, add_completion=False)

STARTUP = Path(__file__).parent.parent / "startup"
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
        width = max(len(check.name) for check in checks)
        for check in checks:
            state = typer.style(f"{check.state:8}", COLOURS[check.state])
            typer.echo(f"{state}{check.name:{width}}  {printable(check.detail)}")
            if check.fix:
                _say(f"{'':{8 + width}}  fix: {check.fix}")
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


Checkpoint = Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="Folder of a checkpoint, or its id on the hub.")]


@app.command()
def inspect(
    checkpoint: Checkpoint, as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False
) -> None:
    """Say what DenseMixer would do with a model: its layers, experts and routers, and how to train these with LoRA.

    Reads the configuration alone, no weights. The exit status is 1 if the model isn't supported, 2 if it can't be read.
    """
    with _reading(checkpoint):
        from densemixer_adapters.cli.inspection import build_empty, inspect_model

        report = inspect_model(build_empty(checkpoint))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    elif not report.supported:
        _say(f"{report.model} ({report.model_type}): not supported", report.reason)
    else:
        others = f", and {report.without_weights} without weights" if report.without_weights else ""
        weights = "renormalised over the selected experts" if report.renormalised else "not renormalised"
        _say(
            f"{report.model} ({report.model_type}): supported",
            f"layers           {len(report.layers)}: {report.layers[0]} to {report.layers[-1]}",
            f"experts          {report.experts}{others}, of which a token goes through {report.selected}",
            f"router           {report.router}: {report.score}, {weights}",
            f"LoRA             modules_to_save={list(report.modules_to_save)} trains the routers in full,",
            f"                 target_parameters={list(report.target_parameters)} through an adapter",
        )
    if not report.supported:
        raise typer.Exit(1)


@app.command()
def cost(
    checkpoint: Checkpoint,
    sequence: Annotated[int, typer.Option("--seq-len", min=1, max=1 << 40, help="Tokens of a sequence.")] = 4096,
    budgets: Annotated[
        list[float], typer.Option("--budget", help="The option `budget` of DenseMixer; may be given several times.")
    ] = [1.0, 0.25, 0.125, 0.0625],  # noqa: B006  # typer's way; it isn't changed
    ep: Annotated[int, typer.Option("--ep", min=1, help="Ranks that the experts are spread over.")] = 1,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that have the same tokens (tensor parallelism).")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Estimate what DenseMixer costs for a model: operations, bytes kept, and a step's time over a conventional one's.

    With --ep or --tp also the bytes that a rank sends. Reads the configuration alone. The formulas are in
    densemixer_adapters/cli/inspection.py and expert_parallel.py. The exit status is 1 if the model isn't supported, 2
    if it can't be read.
    """
    from densemixer_adapters.errors import UnsupportedModelError
    from densemixer_core import DenseMixerConfig

    try:
        configs = [DenseMixerConfig(budget=budget) for budget in budgets]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        with _reading(checkpoint):
            from densemixer_adapters.cli.inspection import build_empty, estimate

            model = build_empty(checkpoint)
            found = [estimate(model, sequence, config, ep, tp) for config in configs]
    except UnsupportedModelError as error:
        _say(f"densemixer cost: {error}", err=True)
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
        f"checkpointing {4e-9 * forward:.4g}.\n\n"
        f"{'':10}{'DenseMixer adds':>18}{'step time, at the same speed':>32}{'kept until the backward':>28}\n"
        f"{'budget':10}{'GFLOP a token':>18}{'plain':>18}{'checkpointed':>14}{'plain':>14}{'checkpointed':>14}"
    )
    for budget, one in zip(budgets, found, strict=True):
        typer.echo(
            f"{budget:<10.4g}{1e-9 * one.extra:18.4g}{one.ratio():17.2f}x{one.ratio(True):13.2f}x"
            f"{one.saved:12d} B{one.saved_checkpointed:12d} B"
        )
    if ep > 1 or tp > 1:
        sent = ", ".join(
            f"{1e-3 * one.sent:.4g} (budget {budget:.4g})" for budget, one in zip(budgets, found, strict=True)
        )
        typer.echo(f"\nA rank sends in the backward, kB a token: {sent}.")


@contextlib.contextmanager
def _reading(checkpoint: str) -> Iterator[None]:
    """Ends with a line and status 2 where a configuration can't be used: it may be anything, and so may the error."""
    from densemixer_adapters.errors import UnsupportedModelError

    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        _say(f"densemixer: can't use the configuration of {checkpoint}: {kind}{one_line(error)}", err=True)
        raise typer.Exit(2) from None


def _say(*lines: str, err: bool = False) -> None:
    """Print lines, of which parts may be from files that others wrote."""
    for line in lines:
        typer.echo(printable(line), err=err)


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
    from densemixer_adapters.cli.report import UnreadableRunError, read_run, write
    from densemixer_adapters.cli.report import as_json as to_json

    try:
        found = read_run(run_dir)
    except UnreadableRunError as error:
        _say(f"densemixer report: {error}", err=True)
        raise typer.Exit(2) from None
    _say(*(f"densemixer report: left out: {file}" for file in found.left_out), err=True)
    if not found.series:
        _say(
            f"densemixer report: {run_dir} has no router metrics. Switch them on for the next run with the option "
            "metrics: `densemixer: {metrics: true}` in LLaMA-Factory, DENSEMIXER_METRICS=1 with DENSEMIXER_ENABLED=1, "
            "callbacks=[DenseMixerCallback()] for a Trainer, +...override_config.densemixer='{metrics: true}' in verl. "
            "What Megatron-LM logs isn't read.",
            err=True,
        )
        raise typer.Exit(1)
    if as_json:
        typer.echo(to_json(found.series))
        return
    _say(*(f"{one.name}: {one.verdict.text}" if one.name else one.verdict.text for one in found.series))
    try:
        written = write(found.series, output or (run_dir if run_dir.is_dir() else run_dir.parent))
    except ImportError:
        _say("densemixer report: drawing needs matplotlib: pip install matplotlib; or use --json", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        _say(f"densemixer report: can't write the report: {error}; choose a folder with --output", err=True)
        raise typer.Exit(2) from None
    _say(f"Wrote {' and '.join(map(str, written))}.")


@app.command()
def selftest(
    checks: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECK]...", help="All of them if none is named.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Check on this machine that the gradients are right, and measure what a step costs. Takes two minutes or less.

    Paste what it prints into an issue. The exit status is 1 if a check failed, otherwise 0.
    """
    try:
        from densemixer_adapters.cli.selftest import about, show, watched
        from densemixer_adapters.selftest import CHECKS, run
    except ImportError as error:
        _say(f"densemixer selftest: needs torch and transformers: {error}", err=True)
        raise typer.Exit(1) from None
    if unknown := [name for name in checks or () if name not in CHECKS]:
        raise typer.BadParameter(f"there is no {unknown[0]!r}; there are {', '.join(map(repr, CHECKS))}")
    outcomes = list(watched(run(checks or [*CHECKS])))
    if as_json:
        typer.echo(json.dumps({"about": about(), "outcomes": [dataclasses.asdict(one) for one in outcomes]}, indent=2))
    else:
        show(outcomes)
    if any(one.state == "failed" for one in outcomes):
        raise typer.Exit(1)


@app.command()
def setup(
    remove: Annotated[bool, typer.Option("--remove", help="Delete the file that this command wrote.")] = False,
) -> None:
    """Install the hook where it doesn't run yet: one file in this environment's site-packages.

    The original had to be set up by this command. Here pip does it, and nothing is left to do, but where Python runs no
    .pth files of the folder that the package is in (pip install --target and PYTHONPATH). It says what it wrote. The
    exit status is 1 if the hook can't be installed, or deleted.
    """
    try:
        typer.echo(_remove_hook() if remove else _install_hook())
    except site_hook.SetupError as error:
        typer.echo(f"densemixer setup: {error}", err=True)
        raise typer.Exit(1) from None


def _install_hook() -> str:
    use = f"Set {_boot.ENABLED}=1, or use your framework's own switch."
    if _boot.is_switched_off():
        raise site_hook.SetupError(f"{_boot.SWITCH}={os.environ[_boot.SWITCH]} switches the hook off; unset it")
    if sys.flags.no_site:
        raise site_hook.SetupError("python -S runs no .pth files; leave out -S")
    if site_hook.runs_in_new_processes():
        return f"Nothing to set up: the hook runs in every Python process of this environment. {use}"
    file = site_hook.install()
    return (
        f"Wrote {file}: from now on the hook runs in every Python process of this environment that can import "
        f"densemixer_adapters. {use} `densemixer setup --remove` undoes it."
    )


def _remove_hook() -> str:
    file = site_hook.remove()
    if file is not None:
        return f"Deleted {file}."
    return f"Nothing to remove: there is no {site_hook.path()}. What pip installed, `pip uninstall` removes."


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(command: Annotated[list[str], typer.Argument(metavar="[--] COMMAND [ARGUMENTS]...")]) -> None:
    """Run COMMAND with DenseMixer for each model that transformers loads in it or in its child processes.

    It sets DENSEMIXER_ENABLED=1, unless that variable is set already, and has the hooks live also where an install's
    .pth files don't run. With DENSEMIXER_ENABLED=0 only a framework's own switch switches DenseMixer on. The exit
    status is COMMAND's, 127 if there is no such command, or 126 if it can't be run.
    """
    if _boot.is_switched_off():
        raise typer.BadParameter(f"{_boot.SWITCH}={os.environ[_boot.SWITCH]} switches the hooks off; unset it")
    program = shutil.which(command[0])
    if program is None:
        cannot = os.path.dirname(command[0]) and os.path.lexists(command[0])
        _say(f"densemixer run: {'cannot execute' if cannot else 'command not found'}: {command[0]}", err=True)
        raise typer.Exit(126 if cannot else 127)
    path = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
    enabled = os.environ.get(_boot.ENABLED, "").strip() or "1"
    environment = {**os.environ, _boot.ENABLED: enabled, "PYTHONPATH": path}
    try:
        os.execve(program, command, environment)
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without `#!`: shells run it themselves
            os.execve("/bin/sh", ["sh", program, *command[1:]], environment)
        _say(f"densemixer run: cannot execute: {command[0]}: {error.strerror}", err=True)
        raise typer.Exit(126) from None
