"""``densemixer selftest kernel`` is red where a kernel is wrong; run by `test_selftest`, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import failed, plant_in_module, selftest_here

from densemixer_adapters.selftest import kernels

FUSED, AT_ONCE = "triton_kernel", "at_once"
WAYS = {FUSED: "kernel: fused kernel", AT_ONCE: "kernel: all at once"}
MASKED, GELU = "parts of tiles, silu concatenated", "whole tiles, gelu concatenated"
FAULTS = {
    "masks": (FUSED, "mask=inside, other=0.0", "mask=inside, other=1.0", MASKED),
    "without masks": (FUSED, "return tl.load(pointers)", "return tl.load(pointers + 1)", GELU),
    "rest of the tokens": (
        FUSED,
        "out + expert * tokens + start + rows, dots",
        "out + expert * tokens + start + rows, dots * (1 + (left < BLOCK_T))",
        MASKED,
    ),
    "interleaved gates": (FUSED, '"STEP": 2 if interleaved else 1', '"STEP": 1', "whole tiles, silu interleaved"),
    "gelu": (FUSED, "0.7071067811865476", "0.9", GELU),
    "gelu_tanh": (FUSED, "0.044715", "0.05", "whole tiles, gelu_tanh concatenated"),
    "relu": (
        FUSED,
        "        return tl.maximum(z, 0.0)\n    else",
        "        return z\n    else",
        "whole tiles, relu concatenated",
    ),
    "relu2": (
        FUSED,
        "tl.maximum(z, 0.0) * tl.maximum(z, 0.0)",
        "tl.maximum(z, 0.0)",
        "parts of tiles, relu2 without gates",
    ),
    "parts": (
        AT_ONCE,
        "up[part].to(x.dtype), down[part].to(x.dtype)",
        "up[: len(up[part])].to(x.dtype), down[: len(up[part])].to(x.dtype)",
        GELU,
    ),
    "parts of the tokens": (AT_ONCE, "g.split(rows), out", "[g[:rows]] * len(g.split(rows)), out", MASKED),
}


@pytest.mark.parametrize("name", FAULTS)
def test_kernel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong, case = FAULTS[name]
    plant_in_module(monkeypatch, tmp_path, f"densemixer_core.kernel.{module}", right, wrong)
    tile, activation = case.split(", ")
    cases = [
        each
        for each in kernels.CASES
        if each.whole == (tile == "whole tiles")
        and activation == f"{each.activation.function} {each.activation.gate or 'without gates'}"
    ]
    monkeypatch.setattr(kernels, "CASES", cases)
    status, outcomes = selftest_here("kernel")
    assert status == 1
    assert all(found.startswith(WAYS[module]) and found.endswith(case) for found in failed(outcomes))
    assert len(failed(outcomes)) == len(cases) == 1
