"""The launcher, with a script of ours that loads and trains as open-instruct's do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from installs import REPOSITORY, is_installed, run

SCRIPT = Path(__file__).with_name("train.py")
MODULE = "densemixer_adapters.open_instruct"

pytestmark = pytest.mark.skipif(
    not (is_installed("deepspeed") and is_installed("accelerate")),
    reason="needs accelerate, deepspeed 0.19.8; run `nox -s llamafactory`",
)


def zero3(folder: Path) -> Path:
    """The example's configuration, so that it partitions small parameters too and leaves gradients as they are."""
    config = json.loads((REPOSITORY / "examples" / "open_instruct" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["gradient_clipping"] = 0.0
    path = folder / "zero3.json"
    path.write_text(json.dumps(config))
    return path


def train(data: Path, folder: Path, *launcher: str | Path, lora: bool = False, **variables: str) -> tuple[Any, str]:
    """What the script saved, and its log."""
    options = ["--model_name_or_path", data / "model", "--batch", data / "batch.pt", "--output", folder / "out.pt"]
    command = [sys.executable, "-m", *launcher, "-m", MODULE, SCRIPT, *options, *(["--use_lora"] if lora else [])]
    # DeepSpeed compiles its CPU communication with ninja, which lies beside the interpreter.
    done = run(command, PATH=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", **variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return torch.load(folder / "out.pt"), done.stderr


def test_accelerate_with_zero3_on_two_ranks(data: Path, tmp_path: Path) -> None:
    from setting import compare

    launcher = ["accelerate.commands.launch", "--use_deepspeed", "--deepspeed_config_file", zero3(tmp_path)]
    saved, log = train(data, tmp_path, *launcher, "--num_processes", "2", "--mixed_precision", "no")
    result = compare(saved["gradients"])
    assert result.error < result.allowed
    assert result.difference > 0.1
    assert saved["leaves"] == 2
    assert log.count("DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM (qwen3_moe): estimator densemixer") == 1


def test_torchrun_and_lora_that_leaves_the_routers_frozen(data: Path, tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    _, log = train(data, tmp_path, *launcher, lora=True, ACCELERATE_USE_CPU="true")
    assert log.count("DenseMixer has nothing to train in 2 of 2 layers, whose routers are frozen") == 1
