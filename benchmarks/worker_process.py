"""The process that `worker.py` runs in, from the side of the one that asks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from worker import Specification

HERE = Path(__file__).parent
ORIGINAL = "ORIGINAL_DENSEMIXER_PYTHON"


class Worker:
    """A process that takes the steps of one setting."""

    def __init__(self, specification: Specification) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the process
        original = specification.setting == "original"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DENSEMIXER_ENABLED": "1" if original else "0"}
        self._process = subprocess.Popen(
            [
                os.environ[ORIGINAL] if original else sys.executable,
                str(HERE / "worker.py"),
                json.dumps(dataclasses.asdict(specification)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._setting = specification.setting

    def step(self) -> float:
        """Seconds of one step."""
        return float(self._ask("step"))

    def finish(self) -> dict[str, Any]:
        """What it measured besides."""
        self._process.stdin.close()  # type: ignore[union-attr]
        found: dict[str, Any] = json.loads(self._answer())
        return found

    def _ask(self, question: str) -> str:
        with contextlib.suppress(BrokenPipeError):  # it has died: the answer says so
            print(question, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        answer = self._process.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            said = "\n".join(self._errors.read().splitlines()[-30:])
            raise RuntimeError(f"the process of {self._setting!r} died with exit status {status}:\n{said}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
