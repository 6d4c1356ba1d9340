"""The ways for GPUs, as far as they can be tested without one: in Triton's interpreter. And the formulas they know."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from installs import is_installed
from layers import Case, Layer
from torch.nn import functional as F

from densemixer_core import Activation, StackedExperts, recognise
from densemixer_core.kernel import fused

INTERPRETED = [Path(__file__).with_name(f"{name}.py") for name in ("interpreted", "interpreted_choice")]
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
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_benchmark_wants_a_gpu() -> None:
    done = run(BENCHMARK, interpret=False)
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr


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
