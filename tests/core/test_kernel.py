"""The fused kernel: as far as it can be tested without a GPU, in Triton's interpreter and by Triton's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from installs import is_installed
from layers import Case, Layer

from densemixer_core import Activation, StackedExperts, fused

HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(not is_installed("triton"), reason="needs triton; run `nox -s transformers`")


@needs_triton
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_a_cpu_computes_expert_by_expert() -> None:
    layer = Layer(Case(), torch.float32)
    layer.layout = type(layer.layout)(layer.layout.activation, formula=Activation("silu", "concatenated"))
    assert not fused.supported(layer.x, StackedExperts(layer.weights, layer.layout), torch.float32)
