"""``densemixer setup`` and ``densemixer run``: the start-up hook where pip doesn't put it, or for one command alone."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from densemixer_adapters import _boot
from densemixer_adapters.cli import site_hook
from densemixer_adapters.cli.printable import say

STARTUP = Path(__file__).parent.parent / "startup"


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
        say(f"densemixer run: {'cannot execute' if cannot else 'command not found'}: {command[0]}", err=True)
        raise typer.Exit(126 if cannot else 127)
    path = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, _boot.ENABLED: _boot.enabled_unless_set(), "PYTHONPATH": path}
    try:
        os.execve(program, command, environment)
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without `#!`: shells run it themselves
            os.execve("/bin/sh", ["sh", program, *command[1:]], environment)
        say(f"densemixer run: cannot execute: {command[0]}: {error.strerror}", err=True)
        raise typer.Exit(126) from None
