"""verl's Megatron engine steps a small model of Megatron Core; the metrics that its worker reports of that.

The engine is verl's own, but for how it builds a model, which needs a GPU and Megatron-Bridge. Prints JSON: what is
measured, the norm of the routers' gradients as Megatron has them, and what is reported without the option ``metrics``.
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

import training  # noqa: E402
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402


def update(options: Any) -> tuple[dict[str, float], float]:
    """The metrics of one update, and the norm of the routers' gradients."""
    (model,) = chunks = training.build_stage(moe_densemixer=options)
    engine: Any = object.__new__(MegatronEngineWithLMHead)
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
    print(json.dumps({"metrics": metrics, "norm": norm, "without": update(True)[0]}))
