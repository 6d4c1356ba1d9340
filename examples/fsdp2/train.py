"""A plain training loop with FSDP2, where the routers learn from all experts.

torchrun --standalone --nproc-per-node 8 train.py --output out
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import load_dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from densemixer_adapters.transformers import apply_densemixer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen1.5-MoE-A2.7B")
    parser.add_argument("--data", default="trl-lib/Capybara", help="name on the hub, or JSON file, with `messages`")
    parser.add_argument("--output", required=True)
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

    # Every process reads the whole model into host memory before it is sharded.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    handle = apply_densemixer(model)  # the one line

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if rank == 0:
        print(f"DenseMixer trains the routers of {len(handle.layers)} layers")

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    for step, ids in enumerate(itertools.islice(batches(options, rank, ranks), options.steps)):
        loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item() / ranks:.4f}, gradient norm {norm.item():.4f}")

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(options.output, state_dict=weights)
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
    dist.barrier()
    dist.destroy_process_group()


def batches(options: argparse.Namespace, rank: int, ranks: int) -> Iterator[Any]:
    """This rank's conversations, one at a time, again and again."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    own = Path(options.data).is_file()
    data = load_dataset("json", data_files=options.data) if own else load_dataset(options.data)
    for row in itertools.cycle(data["train"].shard(ranks, rank)):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        yield tokenizer(text, truncation=True, max_length=options.max_length, return_tensors="pt").input_ids


if __name__ == "__main__":
    main(parse())
