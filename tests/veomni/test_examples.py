"""The example of VeOmni, as its README says to run it without a GPU; verl accepts the settings of the other one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from densemixer_adapters.verl import read_options
from densemixer_core import DenseMixerConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path, commands: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "GPUS": "1", "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_train(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "out", "tiny"))
    here = tmp_path / "examples" / "veomni"
    commands = re.findall(r"```bash\n(.*?)```", (here / "README.md").read_text(), flags=re.DOTALL)[-1]
    output = run(here, commands)
    assert "DenseMixer trains the routers of 2 layers" in output
    assert len(re.findall(r"^step \d: loss \d+\.\d+, gradient norm \d+\.\d+$", output, flags=re.MULTILINE)) == 3


def test_verl_accepts_the_settings() -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.create(run(EXAMPLES / "veomni", "bash grpo.sh --cfg job"))
    assert config.actor_rollout_ref.actor.strategy == "veomni"
    assert config.actor_rollout_ref.actor.veomni.expert_parallel_size == 8
    assert read_options(config.actor_rollout_ref.model.override_config) == DenseMixerConfig()
