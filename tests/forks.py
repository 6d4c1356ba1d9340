"""A program that is started often, each time in a process forked from one that has imported what takes it long."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SECONDS = 570


class Forks:
    """Where a program is run.

    Args:
        modules: What is imported once, in a new interpreter: hooks at the start of Python see it as they always do.
    """

    def __init__(self, *modules: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*modules])

    def run(self, program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[bool, str]:
        """Whether it ended well, and all that it printed.

        Args:
            program: ``module:function``, as an entry point names it.
            arguments: Of the command line, its name first.
            environment: The whole of it, as for `subprocess.run`: none of this process's.
        """
        with tempfile.NamedTemporaryFile() as log:
            process = self._context.Process(target=_run, args=(program, arguments, environment, log.name))
            process.start()
            process.join(SECONDS)
            process.kill()
            return process.exitcode == 0, Path(log.name).read_text()


def _run(program: str, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """In the new process."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*arguments]
    module, _, function = program.partition(":")
    getattr(importlib.import_module(module), function)()
