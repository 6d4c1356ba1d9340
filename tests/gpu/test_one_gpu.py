"""What can be wrong on a GPU and on no CPU: the ways at full size, memory, waiting for the device, and NCCL.

Models are on the GPU with TEST_DEVICE=cuda. On a CPU what needs one is skipped, and the rest shows that it runs.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from device import BACKEND, DEVICE
from families import FAMILIES
from running import sharded
from runs import gradients
from setting import Result, batch
from torch import Tensor, nn

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import Activation, DenseMixerConfig, ExpertLayout, ExpertWeights, StackedExperts, expert_dots
from densemixer_core.kernel.ways import TOLERANCE, ways

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, and TEST_DEVICE=cuda")

SILU = Activation("silu", "concatenated")
QWEN3 = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
TOKENS = 8192


def experts_of(hidden: int, ffn: int, count: int, dtype: torch.dtype) -> StackedExperts:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=DEVICE) / shape[-1] ** 0.5).to(dtype)

    weights = ExpertWeights(random(count, 2 * ffn, hidden), random(count, hidden, ffn))
    return StackedExperts(weights, ExpertLayout(SILU, formula=SILU))


def rows(hidden: int, tokens: int, dtype: torch.dtype) -> Any:
    return torch.randn(2, tokens, hidden, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("tokens", [300, 4096, 9001])
@pytest.mark.parametrize(
    ("hidden", "ffn", "dtype"),
    [(2048, 768, torch.bfloat16), (2048, 768, torch.float16), (4096, 14336, torch.bfloat16)],
    ids=str,
)
def test_each_way_at_full_size(hidden: int, ffn: int, dtype: torch.dtype, tokens: int) -> None:
    """The last and the first tokens of the last expert against float64, and all against each other."""
    experts = experts_of(hidden, ffn, 5, dtype)
    x, g = rows(hidden, tokens, dtype)
    up, down = (weight[-1].double() for weight in experts.weights[:2])
    some = torch.cat([torch.arange(64), torch.arange(tokens - 64, tokens)]).to(DEVICE)
    truth = ((SILU(x[some].double() @ up.t()) @ down.t()) * g[some].double()).sum(-1)
    found = {name: way(x, g) for name, way in ways(experts, 256 << 20).items()}
    found["chosen"] = expert_dots(x, g, experts).t()
    for name, dots in found.items():
        assert oracle.relative_error(dots[-1, some], truth) <= TOLERANCE[dtype], name
        assert oracle.relative_error(dots, found["one by one"]) <= TOLERANCE[dtype], name


def layer_of(config: DenseMixerConfig | None, **options: Any) -> nn.Module:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1, **options).bfloat16()
    if config is not None:
        apply_densemixer(model, config)
    return model.model.layers[0].mlp


def step(layer: nn.Module, x: Tensor, g: Tensor) -> None:
    layer(x.requires_grad_()).backward(g)


@needs_gpu
@pytest.mark.parametrize("config", [DenseMixerConfig(workspace_mb=64), DenseMixerConfig(budget=1 / 8, workspace_mb=64)])
def test_memory_at_full_size(config: DenseMixerConfig) -> None:
    """The most in use in a step of one layer, over that of conventional training."""
    x, g = (row.unsqueeze(0) for row in rows(QWEN3["hidden_size"], TOKENS, torch.bfloat16))
    peaks = []
    for one in (None, config):
        layer = layer_of(one, **QWEN3)
        step(layer, x, g)  # which compares ways, and makes the gradients' memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(layer, x, g)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del layer
    pairs = TOKENS * QWEN3["num_experts"]
    copies = 2 * x.nbytes * (1 if config.budget < 1 else 0)
    assert peaks[1] - peaks[0] <= (64 << 20) + 60 * pairs + copies


@needs_gpu
@pytest.mark.parametrize("budget", [1, 1 / 8])
def test_nothing_waits_for_the_device(budget: float) -> None:
    """From the second step on; or the host does so without DenseMixer."""
    x, g = (row.unsqueeze(0) for row in rows(64, 256, torch.bfloat16))

    def second_step_waits(layer: nn.Module) -> bool:
        step(layer, x, g)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(layer, x, g)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    if second_step_waits(layer_of(None)):
        pytest.skip("the host waits for the device itself")
    assert not second_step_waits(layer_of(DenseMixerConfig(budget=budget)))


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_checkpointing(implementation: str, kind: str) -> None:
    model = FAMILIES["qwen3_moe"].build(implementation)
    with apply_densemixer(model):
        plain = gradients(model, batch())
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        oracle.assert_close(gradients(model, batch()), plain)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(BACKEND, store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "way", [sharded.ddp, sharded.fsdp1, sharded.fsdp2, sharded.half_fsdp2], ids=lambda way: way.__name__
)
def test_one_rank(way: Any) -> None:
    result: Result = way()
    assert result.error <= result.allowed
    assert result.difference > 0.1
