"""Ends a part with all that it started: also what has a session of its own, as the workers of torchrun have."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator, Set
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


class Interruption:
    """The first signal that is to end this process. It is kept, and interrupts nothing but what waits for it.

    Attributes:
        name: The signal's, once it has come.
    """

    def __init__(self) -> None:
        self.name = ""
        self._awaited = False

    def listen(self) -> None:
        """From now on. A signal that is ignored already, as under nohup, stays so."""
        for each in SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                signal.signal(each, self._arrives)

    def _arrives(self, number: int, _: object) -> None:
        first, self.name = not self.name, self.name or signal.Signals(number).name
        if first and self._awaited:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within, it raises KeyboardInterrupt, be it that it has come before."""
        self._awaited = True
        try:
            if self.name:
                raise KeyboardInterrupt
            yield
        finally:
            self._awaited = False
