from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "examples" / "demo"
sys.path[:0] = [str(REPOSITORY / "experiments"), str(DEMO)]


@pytest.fixture(scope="session")
def experiment() -> Callable[..., str]:
    """Runs the experiment as a user does, with these arguments at the smallest size; what it prints."""

    def run(*arguments: str | Path) -> str:
        path = [str(DEMO), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, REPOSITORY / "experiments", "--size", "tiny", "--jobs", "1", *arguments],
            capture_output=True,
            text=True,
            timeout=900,  # where other tests have the processor
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
