"""What router metrics cost. Usage: python benchmarks/metrics_overhead.py [STEPS].

A Qwen3-MoE of 4 layers with 32 experts, 4 of them selected, trains on batches of 4 sequences of 512 tokens, measured as
the HF Trainer's callback does. All settings take turns, step by step, on models of their own. Prints each one's median.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.transformers import apply_densemixer

SETTINGS = ("off", "on, a step that isn't logged", "on, a step that is logged")


def make(setting: str) -> Callable[[torch.Tensor], None]:
    """A training step with or without metrics."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=256,
        moe_intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config).train()
    layers = apply_densemixer(model).layers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    metrics = None if setting == SETTINGS[0] else RouterMetrics(layers, model)

    def step(ids: torch.Tensor) -> None:
        if metrics is not None:
            metrics.start_step()
        model(input_ids=ids, labels=ids).loss.backward()
        if metrics is not None:
            metrics.before_update(optimizer)
        optimizer.step()
        if metrics is not None:
            metrics.after_update()
        optimizer.zero_grad()
        if metrics is not None and setting == SETTINGS[2]:
            metrics.measure()

    return step


def main(steps: int) -> None:
    settings = {setting: make(setting) for setting in SETTINGS}
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for number in range(steps + 1):  # the first one warms up
        ids = torch.randint(8192, (4, 512), generator=torch.Generator().manual_seed(number))
        for setting, step in settings.items():
            start = time.perf_counter()
            step(ids)
            seconds[setting].append(time.perf_counter() - start)
    medians = {setting: statistics.median(times[1:]) for setting, times in seconds.items()}
    for setting, median in medians.items():
        print(f"{setting:30}{1000 * median:8.0f} ms{median / medians[SETTINGS[0]]:8.2f}x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
