"""Loads a checkpoint under ZeRO-3's zero.Init and takes the gradients of a batch, without a word about DenseMixer.

Usage: torchrun --nproc-per-node 2 zero3.py REPORT. Each rank has half of the batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from runs import loss_of
from setting import batch, build, compare
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "leaf_module": {"classes": []},  # DeepSpeed knows this class itself
    },
    "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
}


def load() -> Any:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        build().save_pretrained(folder[0])
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float32).train()


def main(report: Path) -> None:
    deepspeed.init_distributed("gloo")
    zero3 = HfDeepSpeedConfig(CONFIG)  # transformers looks for it, as long as it lives
    model = load()
    found = {
        "partitioned": all(hasattr(parameter, "ds_id") for parameter in model.parameters()),
        "leaf modules": get_z3_leaf_modules(model) == [layer.mlp for layer in model.model.layers],
    }
    del zero3
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)[0]
    engine.backward(loss_of(engine, batch().chunk(dist.get_world_size())[dist.get_rank()]))
    result = compare({name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()})
    if dist.get_rank() == 0:
        report.write_text(json.dumps({**found, **dataclasses.asdict(result)}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive what they belong to


if __name__ == "__main__":
    main(Path(sys.argv[1]))
