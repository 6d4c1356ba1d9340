"""Models that a Ray actor loads, where the start-up hook runs in Ray's workers, and where it doesn't."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from installs import REPOSITORY, Environment, is_installed, run

SCRIPT = Path(__file__).with_name("actors.py")

pytestmark = pytest.mark.skipif(not is_installed("ray"), reason="needs ray; run `nox -s verl`")


@pytest.mark.parametrize("hook", [True, False])
def test_an_actor(data: Path, tmp_path: Path, hook: bool) -> None:
    from setting import compare

    python, variables = Path(sys.executable), {}
    if not hook:
        environment = Environment.create(tmp_path / "environment")
        environment.borrow()  # without our .pth file
        python = environment.python
        variables["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "adapters")])
    files = [data / "model", data / "batch.pt", tmp_path / "out.pt"]
    done = run([python, "-m", "densemixer_adapters.open_instruct", SCRIPT, *files], **variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = compare(torch.load(tmp_path / "out.pt"))
    assert result.error < result.allowed
    assert result.difference > 0.1
