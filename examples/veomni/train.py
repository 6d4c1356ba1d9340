"""A training loop of VeOmni's parts, where the routers learn from all experts.

torchrun --standalone --nproc-per-node 8 train.py --expert-parallel 8
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_dataset
from torch import Tensor
from transformers import AutoTokenizer
from veomni.arguments import MixedPrecisionConfig, OpsImplementationConfig
from veomni.distributed.parallel_state import init_parallel_state
from veomni.distributed.torch_parallelize import build_parallelize_model
from veomni.models.auto import build_foundation_model
from veomni.optim import build_optimizer

from densemixer_adapters.transformers import apply_densemixer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="a folder that holds it")
    parser.add_argument("--data", default="trl-lib/Capybara", help="name on the hub, or JSON file, with `messages`")
    parser.add_argument("--expert-parallel", type=int, default=1, help="the ranks that experts are spread over")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--max-length", type=int, default=2048)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    init_parallel_state(dp_size=ranks, dp_shard_size=ranks, extra_parallel_sizes=(options.expert_parallel,))

    model = build_foundation_model(
        options.model, options.model, "float32", ops_implementation=kernels(on_gpu), init_device="meta"
    )
    handle = apply_densemixer(model)  # the one line, before the model is spread

    model = build_parallelize_model(
        model,
        weights_path=options.model,
        mixed_precision=MixedPrecisionConfig(enable=on_gpu),
        init_device="meta",
        broadcast_model_weights_from_rank0=True,
        basic_modules=list(model._no_split_modules),
    ).train()
    if rank == 0:
        print(f"DenseMixer trains the routers of {len(handle.layers)} layers")

    optimizer = build_optimizer(model, lr=options.learning_rate)
    for step, ids in enumerate(itertools.islice(batches(options, rank, ranks), options.steps)):
        loss = model(input_ids=ids.to(device), labels=ids.to(device), use_cache=False).loss
        loss.backward()
        norm = model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item() / ranks:.4f}, gradient norm {float(norm):.4f}")
    dist.barrier()
    dist.destroy_process_group()


def kernels(on_gpu: bool) -> OpsImplementationConfig:
    """VeOmni's fused experts on a GPU, which its expert parallelism needs; else everything in plain torch."""
    names = [field.name for field in dataclasses.fields(OpsImplementationConfig)]
    plain = {name: "eager" for name in names if name.endswith("_implementation")}
    experts = "fused_triton" if on_gpu else "eager"
    chosen = {"moe_implementation": experts, "attn_implementation": "sdpa", "qat_implementation": "none"}
    return OpsImplementationConfig(**{**plain, **chosen})


def batches(options: argparse.Namespace, rank: int, ranks: int) -> Iterator[Tensor]:
    """This rank's conversations, one at a time, again and again."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    own = Path(options.data).is_file()
    data = load_dataset("json", data_files=options.data) if own else load_dataset(options.data)
    for row in itertools.cycle(data["train"].shard(ranks, rank)):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        yield tokenizer(text, truncation=True, max_length=options.max_length, return_tensors="pt").input_ids


if __name__ == "__main__":
    main(parse())
