"""Runs a script of this folder by itself, which writes a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDERS = [str(folder) for folder in (HERE, HERE.parent, HERE.parent / "verl", HERE.parents[1] / "examples/automodel")]


def run(name: str, *arguments: object, report: Path) -> dict[str, Any]:
    """The JSON that it writes to ``report``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, HERE / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(report.read_text())
    return found
