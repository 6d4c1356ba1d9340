"""Loads a checkpoint under ZeRO-3's zero.Init and takes the gradients of a batch, without a word about DenseMixer.

Usage: torchrun --nproc-per-node 2 zero3.py REPORT. Each rank has half of the batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from running.zero import zero_config
from runs import loss_of
from setting import batch, compare, saved
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

CONFIG = {**zero_config(3), "optimizer": {"type": "SGD", "params": {"lr": 0.0}}}


def main(report: Path) -> None:
    deepspeed.init_distributed("gloo")
    zero3 = HfDeepSpeedConfig(CONFIG)  # transformers looks for it, as long as it lives
    model = AutoModelForCausalLM.from_pretrained(saved("qwen3_moe"), dtype=torch.float32).train()
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
