"""What DenseMixer adds to an actor's update in verl, in time and memory, on this machine.

Usage: PYTHONPATH=tests:tests/verl python benchmarks/verl_update.py; tests have what lets verl run without a GPU. verl's
training worker updates a Qwen3-MoE of 4 layers with 32 experts, 4 of them selected, on one FSDP2 rank. For the time,
two workers in one process take turns; for the memory, each has a process of its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, SEQUENCES, LENGTH = 7, 4, 512


def save_model(folder: Path) -> None:
    from assets import make_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=256,
        moe_intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def update(worker: Any) -> float:
    import torch
    from engines import pack

    rows = [torch.randint(3, 259, (LENGTH,)) for _ in range(SEQUENCES)]
    start = time.perf_counter()
    worker.train_batch(pack(rows))
    return time.perf_counter() - start


def measure(assets: Path, report: Path, *kinds: str) -> None:
    from engines import build
    from verl.utils.distributed import initialize_global_process_group_ray

    initialize_global_process_group_ray()
    overrides: dict[str, dict[str, Any]] = {"on": {"densemixer": True}, "off": {}}
    workers = {kind: build(assets, overrides[kind], {}, {"micro_batch_size_per_gpu": SEQUENCES}) for kind in kinds}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(STEPS):
        for kind in kinds:
            seconds[kind].append(update(workers[kind]))
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    report.write_text(json.dumps({"seconds": medians, "all": seconds, "peak MiB": growth}))


def main() -> None:
    from launch import HERE, torchrun

    with tempfile.TemporaryDirectory() as name:
        assets = Path(name)
        save_model(assets / "model")
        for kinds in (["on", "off"], ["on"], ["off"]):
            folder = assets / "-".join(kinds)
            environment = {"VERL_USE_EXTERNAL_MODULES": "cpu_platform,hf_rollout", "FIRST": str(HERE)}
            torchrun(folder, Path(__file__), assets, folder / "report.json", *kinds, ranks=1, **environment).check()
            print(*kinds, (folder / "report.json").read_text(), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    else:
        main()
