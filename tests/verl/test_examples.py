"""The settings of `examples/verl` are settings of verl, and switch DenseMixer on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from densemixer_adapters.verl import read_options
from densemixer_core import DenseMixerConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "verl"
ROLES = {
    "grpo.sh": ["actor_rollout_ref"],
    "ppo.sh": ["actor_rollout_ref", "critic"],
    "lora.sh": ["actor_rollout_ref"],
    "sft.sh": [],
    "megatron.sh": [],
}


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.sh")))
@pytest.mark.usefixtures("assets")
def test_verl_accepts_the_settings(script: str) -> None:
    from omegaconf import OmegaConf

    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "GPUS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", EXAMPLES / script, "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    config = OmegaConf.create(done.stdout)
    for role in ROLES[script]:
        assert read_options(config[role].model.override_config) == DenseMixerConfig()
    if script == "megatron.sh":
        assert config.actor_rollout_ref.actor.strategy == "megatron"
        assert config.actor_rollout_ref.actor.megatron.override_transformer_config.moe_densemixer is True
    elif not ROLES[script]:
        assert read_options(config.model.override_config) == DenseMixerConfig()
