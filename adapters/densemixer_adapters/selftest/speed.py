"""What a step of one layer takes: conventional, exact and with budgets, in turns; and the ways to evaluate experts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from densemixer_adapters.selftest.gradients import step, tiny_model, tokens
from densemixer_adapters.selftest.outcome import Outcome
from densemixer_adapters.selftest.samples import SILU
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig, ExpertLayout, ExpertWeights, StackedExperts
from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.ways import ways

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
    median = _in_turns(runs, device)
    rate = 16 * 2 * 1024**3 / median.pop("matmul")
    case = f"one layer, hidden {hidden}, ffn {ffn}, 128 experts, top-8, {count} tokens"
    yield Outcome("speed", "products of 1024 x 1024", "ok", f"{rate / 1e9:.0f} GFLOP/s")
    yield Outcome("speed", f"{case}, conventional", "ok", f"{1e3 * median['conventional']:.1f} ms")
    for name in BUDGETS:
        ratio = median[name] / median["conventional"]
        yield Outcome("speed", f"the same, {name}", "ok", f"{1e3 * median[name]:.1f} ms, {ratio:.2f}x")
    plain, ours = (_saved(layers[name], x, g) for name in ("conventional", "exact"))
    yield Outcome("speed", "kept until the backward", "ok", f"{(ours - plain) / count:.0f} bytes a token more")


@torch.no_grad()
def check_ways(device: str) -> Iterator[Outcome]:
    """The inner products of such a layer by each way that there is; which is used is found like this."""
    if device == "cpu" and not INTERPRETED:
        yield Outcome("ways", "fused kernel, all at once", "skipped", "needs a GPU: a CPU computes experts one by one")
        return
    hidden, ffn, count, held = (2048, 768, 4096, 128) if device == "cuda" else (32, 16, 16, 2)
    x, g = (rows[0] for rows in tokens(torch.bfloat16, device, count, hidden))
    up = torch.randn(held, 2 * ffn, hidden, device=device).to(x) / hidden**0.5
    down = torch.randn(held, hidden, ffn, device=device).to(x) / ffn**0.5
    stacked = StackedExperts(ExpertWeights(up, down), ExpertLayout(SILU, formula=SILU))
    runs = {name: lambda way=way: way(x, g) for name, way in ways(stacked, 1 << 28).items()}
    for name, seconds in _in_turns(runs, device).items():
        rate = 6 * count * held * hidden * ffn / seconds
        yield Outcome(
            "ways", f"{held} experts, {count} tokens, {name}", "ok", f"{1e3 * seconds:.2f} ms, {rate / 1e9:.0f} GFLOP/s"
        )


def _in_turns(runs: Mapping[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """The median of each one's seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            taken = _seconds(run, device)
            if turn:  # warm by then
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
