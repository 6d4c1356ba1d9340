"""ZeRO-3 on two ranks, through accelerate and the HF Trainer, and why its leaf modules are marked.

The gradients are those of a dense oracle on the whole batch in one process. `tests/running` has ZeRO by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from installs import is_installed

WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    if not is_installed("deepspeed"):
        pytest.skip("needs deepspeed 0.19.8; run `nox -s llamafactory`")
    report = tmp_path_factory.mktemp("deepspeed") / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, report]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(WORKER.parents[1]), os.environ.get("PYTHONPATH")])),
        # DeepSpeed compiles its CPU communication with ninja, which lies beside the interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(report.read_text())


def test_the_oracle_can_tell_densemixer_from_conventional_training(errors: dict[str, float]) -> None:
    assert errors["conventional"] > 0.1


@pytest.mark.parametrize("front_end", ["accelerate", "trainer"])
def test_equal_to_the_oracle_through_a_front_end(errors: dict[str, float], front_end: str) -> None:
    assert errors[f"zero3 {front_end}"] < 1e-5


def test_leaf_modules_keep_the_order_of_modules(errors: dict[str, float]) -> None:
    assert errors["out of order with leaf modules"] == 0
    assert errors["out of order without"] > 0  # else the marks would be of no use
