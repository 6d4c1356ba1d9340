"""verl's Megatron backend needs GPUs; what it makes of our key on the way to Megatron Core's configuration does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONVERT = """
import torch, torch.distributed as dist
from megatron.core import parallel_state
from transformers import Qwen3MoeConfig
from verl.workers.config import McoreEngineConfig
from verl.models.mcore import hf_to_mcore_config

torch.cuda.current_device = lambda: torch.device("cpu")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
override = {"moe_densemixer": {"estimator": "centered"}}
engine = McoreEngineConfig(override_transformer_config=override)
model = Qwen3MoeConfig(num_hidden_layers=2, architectures=["Qwen3MoeForCausalLM"])
config = hf_to_mcore_config(model, torch.bfloat16, **engine.override_transformer_config)
assert config.num_moe_experts == model.num_experts
assert config.moe_densemixer == override["moe_densemixer"]
try:
    hf_to_mcore_config(model, torch.bfloat16, moe_densemixer={"estimater": "centered"})
except ValueError as error:
    assert "moe_densemixer: unknown option" in str(error)
else:
    raise AssertionError("a wrong option was accepted")
"""


@pytest.mark.usefixtures("assets")
@pytest.mark.skipif(
    "MEGATRON_CORE" not in os.environ, reason="needs MEGATRON_CORE, a folder with it; run `nox -s verl`"
)
def test_the_key_reaches_the_configuration_of_megatron_core(tmp_path: Path) -> None:
    """verl drops, with a warning, every key that Megatron's class doesn't have."""
    path = os.pathsep.join(filter(None, [os.environ["MEGATRON_CORE"], os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", CONVERT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
