"""The fused kernel: as far as it can be tested without a GPU, in Triton's interpreter and by Triton's compiler."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from installs import is_installed
from layers import Case, Layer
from torch.nn import functional as F

from densemixer_core import Activation, StackedExperts, recognise
from densemixer_core.kernel import fused

INTERPRETED = Path(__file__).parent / "interpreted.py"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernel.py"

needs_triton = pytest.mark.skipif(not is_installed("triton"), reason="needs triton; run `nox -s core`")


def run(*command: str | Path, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=570,
    )


@needs_triton
def test_in_the_interpreter() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", INTERPRETED)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_the_benchmark_runs(tmp_path: Path) -> None:
    sizes = {"tokens": 20, "hidden": 24, "ffn": 20, "experts": 2, "matmul": 64, "repetitions": 2, "dtype": "float32"}
    done = run(BENCHMARK, "--csv", tmp_path / "kernel.csv", *(f"--{name}={value}" for name, value in sizes.items()))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "kernel.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["large product", "products", "kernel"]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) < 1e-5


def test_the_benchmark_wants_a_gpu() -> None:
    done = run(BENCHMARK, interpret=False)
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr


QWEN3 = dict(hidden=2048, ffn=768, activation=Activation("silu", "concatenated"))
GPT_OSS = dict(hidden=2880, ffn=2880, activation=Activation("silu", "interleaved", 1.702, 7.0, 1.0))
NEMOTRON = dict(hidden=2688, ffn=1856, activation=Activation("relu2"))


@needs_triton
@pytest.mark.parametrize(
    ("capability", "shared_kib", "instruction"), [(80, 163, "mma.sync"), (90, 227, "wgmma.mma_async")]
)
@pytest.mark.parametrize(
    ("layer", "weights", "transposed"),
    [(QWEN3, "bf16", False), (GPT_OSS, "bf16", True), (NEMOTRON, "fp32", False)],
    ids=["qwen3_moe", "gpt_oss", "nemotron_h under autocast"],
)
def test_compiles_for_gpus(
    layer: dict[str, Any],
    weights: str,
    transposed: bool,
    capability: int,
    shared_kib: int,
    instruction: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the tensor cores' instructions, and with some tiles for which the GPU has the shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from densemixer_core.kernel import triton_kernel

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel = triton_kernel._dots.fn
    names = kernel.arg_names
    pointers = {name: "*bf16" for name in ("x", "g")} | {name: f"*{weights}" for name in ("up", "down", "up_bias")}
    pointers["out"] = "*fp32"
    unit = ("up_out", "down_out") if transposed else ("up_in", "down_in")
    fitting = 0
    for config in triton_kernel._dots.configs[::3]:
        fixed = triton_kernel.constants(**layer, biased=transposed) | config.kwargs | dict.fromkeys(unit, 1)
        signature = {name: pointers.get(name, "constexpr" if name in fixed else "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in {*fixed, "tokens"}}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, aligned)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert instruction in compiled.asm["ptx"]
        fitting += compiled.metadata.shared <= shared_kib << 10
    assert fitting


def test_a_cpu_computes_expert_by_expert() -> None:
    layer = Layer(Case(), torch.float32)
    layer.layout = dataclasses.replace(layer.layout, formula=Activation("silu", "concatenated"))
    assert not fused.supported(layer.x, StackedExperts(layer.weights, layer.layout), torch.float32)


def gated(function, limit: float = float("inf"), offset: float = 0.0, interleaved: bool = False):
    def activation(z: torch.Tensor) -> torch.Tensor:
        gate, up = (z[..., ::2], z[..., 1::2]) if interleaved else z.chunk(2, -1)
        return function(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + offset)

    return activation


def slope(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(1.702 * z)


@pytest.mark.parametrize(
    ("activation", "parameters", "formula"),
    [
        (gated(F.silu), (), Activation("silu", "concatenated")),
        (gated(F.gelu), (), Activation("gelu", "concatenated")),
        (gated(lambda z: F.gelu(z, approximate="tanh")), (), Activation("gelu_tanh", "concatenated")),
        (gated(F.relu, interleaved=True), (), Activation("relu", "interleaved")),
        (gated(F.silu, 10.0), (None, 10.0), Activation("silu", "concatenated", limit=10.0)),
        (
            gated(slope, 7.0, 1.0, interleaved=True),
            (1.702, 7.0),
            Activation("silu", "interleaved", 1.702, 7.0, 1.0),
        ),
        (gated(F.silu), (1.702, 7.0), Activation("silu", "concatenated")),
        (gated(F.silu, 10.0), (None, 9.0), None),
        (gated(F.silu, 900.0), (), None),
        (gated(slope, 7.0, 1.0), (1.7, 7.0), None),
        (gated(F.hardswish), (), None),
        (lambda z: F.silu(z) * torch.ones(1, 1, device="meta"), (), None),
    ],
)
def test_recognised(activation, parameters: tuple[float | None, ...], formula: Activation | None) -> None:
    assert recognise(activation, True, *parameters) == formula


@pytest.mark.parametrize(
    ("activation", "formula"), [(F.relu, "relu"), (lambda z: F.relu(z) ** 2, "relu2"), (F.mish, None)]
)
def test_recognised_without_gates(activation, formula: str | None) -> None:
    assert recognise(activation, False) == (formula and Activation(formula))
