"""A program that is started often, each time in a process forked from one that has imported what takes it long."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
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

    def run(
        self, program: str, arguments: Sequence[str], environment: Mapping[str, str], ranks: int = 1
    ) -> tuple[bool, str]:
        """Whether it ended well, and all that it printed.

        Args:
            program: ``module:function``, as an entry point names it.
            arguments: Of the command line, its name first.
            environment: The whole of it, as for `subprocess.run`: none of this process's.
            ranks: How many processes run it, with what torchrun says to each in its environment.
        """
        with tempfile.NamedTemporaryFile() as log, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            free.close()
            processes = []
            for rank in map(str, range(ranks)):
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                settings = {**environment, **(world | meeting if ranks > 1 else {})}
                processes.append(self._context.Process(target=_run, args=(program, arguments, settings, log.name)))
                processes[-1].start()
            for process in processes:
                process.join(SECONDS)
            for process in processes:
                process.kill()
            return all(process.exitcode == 0 for process in processes), Path(log.name).read_text()


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
