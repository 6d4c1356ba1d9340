"""Ends a part with all that it started: also what has a session of its own, as the workers of torchrun have."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Set
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def adopt_orphans() -> None:
    """From now on, processes below this one whose parent has ended become its children, so that it can find them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def children() -> set[int]:
    """The processes whose parent is this one, those too that have ended and wait for it to ask."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(int(path.parent.name))
    return found


def end_all_but(kept: Set[int]) -> None:
    """End the children of this process but some. Theirs become its own, if it has adopted, and are ended next."""
    while left := children() - kept:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, 0)


def interrupt_on_signals() -> None:
    """The first signal that ends this process raises KeyboardInterrupt with its name; no other disturbs what follows.

    One that is ignored already, as under nohup, stays so.
    """

    def interrupt(number: int, _: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, interrupt)
