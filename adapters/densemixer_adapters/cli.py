"""The command ``densemixer``."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from densemixer_adapters import _boot
from densemixer_adapters.doctor import examine

app = typer.Typer(help="DenseMixer in training frameworks.", no_args_is_help=True, add_completion=False)

STARTUP = Path(__file__).parent / "startup"
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


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
            typer.echo(f"{typer.style(f'{check.state:8}', COLOURS[check.state])}{check.name:{width}}  {check.detail}")
            if check.fix:
                typer.echo(f"{'':{8 + width}}  fix: {check.fix}")
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Run COMMAND with the hooks live in it and in its child processes, where an install's .pth files don't run.

    Usage: densemixer run -- COMMAND [ARGUMENTS]...
    """
    command = context.args
    if not command:
        raise typer.BadParameter("give a command, e.g. densemixer run -- llamafactory-cli train my.yaml")
    if _boot.is_switched_off():
        raise typer.BadParameter(f"{_boot.SWITCH}={os.environ[_boot.SWITCH]} switches the hooks off; unset it")
    if shutil.which(command[0]) is None:
        typer.echo(f"densemixer run: command not found: {command[0]}", err=True)
        raise typer.Exit(127)
    path = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
    os.execvpe(command[0], command, {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    app()
