"""verl's Megatron backend needs GPUs; what it makes of our key on the way to Megatron Core's configuration does not."""

from __future__ import annotations

import json
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


pytestmark = [
    pytest.mark.usefixtures("assets"),
    pytest.mark.skipif(
        "MEGATRON_CORE" not in os.environ, reason="needs MEGATRON_CORE, a folder with it; run `nox -s verl`"
    ),
]


def test_the_key_reaches_the_configuration_of_megatron_core(tmp_path: Path) -> None:
    """verl drops, with a warning, every key that Megatron's class doesn't have."""
    path = os.pathsep.join(filter(None, [os.environ["MEGATRON_CORE"], os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", CONVERT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


def test_its_engine_reports_router_metrics(tmp_path: Path) -> None:
    from launch import execute

    first = os.pathsep.join([os.environ["MEGATRON_CORE"], str(Path(__file__).parents[1] / "megatron")])
    script = Path(__file__).with_name("megatron_engine.py")
    run = execute(tmp_path / "run", [sys.executable, script], {"FIRST": first}).check()
    found = json.loads(run.output.splitlines()[-1])
    assert found["metrics"]["densemixer/router_grad_norm"] == pytest.approx(found["norm"], rel=1e-5)
    assert 0.01 < found["metrics"]["densemixer/layer_1/router_grad_share_unselected"] < 0.99
    assert len(found["metrics"]) == 3 * 5  # of two layers, and of both
    assert found["without"] == {}
