"""What a step of one layer takes: conventional, exact and with budgets, in turns; and the rate of plain products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from densemixer_adapters.selftest.gradients import step, tiny_model, tokens
from densemixer_adapters.selftest.outcome import Outcome
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

BUDGETS = {"exact": 1.0, "budget 1/8": 1 / 8, "budget 1/32": 1 / 32}
ROUNDS = 7


def check_speed(device: str) -> Iterator[Outcome]:
    """A layer of Qwen3-30B-A3B, on a CPU at an eighth of its widths, as the machine is: nothing here can fail."""
    hidden, ffn, count = (2048, 768, 4096) if device == "cuda" else (256, 96, 1024)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = {"hidden_size": hidden, "moe_intermediate_size": ffn, "num_experts": 128, "num_experts_per_tok": 8}
    x, g = tokens(dtype, device, count, hidden)

    def block(budget: float | None) -> Any:
        model = tiny_model(dtype, device, **sizes)
        model.set_experts_implementation("grouped_mm")
        if budget is not None:
            apply_densemixer(model, DenseMixerConfig(budget=budget))
        return model.model.layers[0].mlp

    layers = {"conventional": block(None), **{name: block(budget) for name, budget in BUDGETS.items()}}
    a, b = torch.randn(2, 1024, 1024, device=device, dtype=dtype)
    runs: dict[str, Callable[[], Any]] = {name: lambda layer=layer: step(layer, x, g) for name, layer in layers.items()}  # type: ignore[misc]
    runs["matmul"] = lambda: [a @ b for _ in range(16)]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            taken = _seconds(run, device)
            if turn:  # warm by then
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = 16 * 2 * 1024**3 / median.pop("matmul")
    case = f"one layer, hidden {hidden}, ffn {ffn}, 128 experts, top-8, {count} tokens"
    yield Outcome("speed", "products of 1024 x 1024", "ok", f"{rate / 1e9:.0f} GFLOP/s")
    yield Outcome("speed", f"{case}, conventional", "ok", f"{1e3 * median['conventional']:.1f} ms")
    for name in BUDGETS:
        ratio = median[name] / median["conventional"]
        yield Outcome("speed", f"the same, {name}", "ok", f"{1e3 * median[name]:.1f} ms, {ratio:.2f}x")
    plain, ours = (_saved(layers[name], x, g) for name in ("conventional", "exact"))
    yield Outcome("speed", "kept until the backward", "ok", f"{(ours - plain) / count:.0f} bytes a token more")


def _seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _saved(layer: Any, x: torch.Tensor, g: torch.Tensor) -> int:
    """Bytes of the storages that autograd saves in one step, each counted once."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(layer, x, g)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
