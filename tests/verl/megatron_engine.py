"""What verl makes of our field on the way to Megatron Core, and what its Megatron engine reports of a step, as JSON.

Engine and worker are verl's own, but for how they build a model, which needs a GPU and Megatron-Bridge: a small model
of Megatron Core is in its place.
"""

from __future__ import annotations

import json
from typing import Any

import cpu
import torch
import torch.distributed as dist
from megatron.core import parallel_state

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()

import small_models  # noqa: E402
import training  # noqa: E402
from transformers import Qwen3MoeConfig  # noqa: E402
from verl.models.mcore import hf_to_mcore_config  # noqa: E402
from verl.workers.config import McoreEngineConfig  # noqa: E402
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402


def convert(options: Any) -> Any:
    """The field in what verl converts a model's configuration to, or the error that it ends with."""
    engine = McoreEngineConfig(override_transformer_config={"moe_densemixer": options})
    model = Qwen3MoeConfig(num_hidden_layers=2, architectures=["Qwen3MoeForCausalLM"])
    try:
        config = hf_to_mcore_config(model, torch.bfloat16, **engine.override_transformer_config)
    except ValueError as error:
        return str(error)
    assert config.num_moe_experts == model.num_experts
    return config.moe_densemixer


def update(options: Any) -> tuple[dict[str, float], float]:
    """The metrics of one update, and the norm of the routers' gradients as Megatron has them."""
    (model,) = chunks = small_models.build_stage(moe_densemixer=options)
    engine: Any = object.__new__(MegatronEngineWithLMHead)
    engine.engine_config = McoreEngineConfig()
    engine.module, engine.optimizer = training.wrap(chunks)
    engine.optimizer_zero_grad()
    training.forward_backward(engine.module)
    norm = torch.stack([layer.mlp.router.weight.main_grad.norm() for layer in model.decoder.layers]).norm()
    with cpu.CudaIsCpu():
        engine.optimizer_step()
    worker: Any = object.__new__(TrainingWorker)
    worker.engine, worker.device_name, worker.flops_counter = engine, "cpu", None
    output = worker._postprocess_output(
        {"loss": [1.0], "metrics": {}}, global_token_num=None, delta_time=1.0, forward_only=False, images_seqlens=None
    )
    metrics = {name: value for name, value in output["metrics"].items() if name.startswith("densemixer/")}
    return metrics, norm.item()


if __name__ == "__main__":
    metrics, norm = update({"metrics": True})
    report = {
        "converted": convert({"estimator": "centered"}),
        "misspelt": convert({"estimater": "centered"}),
        "metrics": metrics,
        "norm": norm,
        "without the option": update(True)[0],
    }
    print(json.dumps(report))
