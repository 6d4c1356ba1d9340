"""What Triton's own compiler says of the kernels, for GPUs that aren't here."""

from __future__ import annotations

from typing import Any

import pytest
from installs import is_installed

from densemixer_core import Activation

if not is_installed("triton"):
    pytest.skip("needs triton; run `nox -s core`", allow_module_level=True)

import triton
from resources import SHARED_KIB, THREADS, Compiled, epilogue, fused_kernel

from densemixer_core.kernel import triton_kernel

QWEN3: dict[str, Any] = dict(hidden=2048, ffn=768, activation=Activation("silu", "concatenated"))
GPT_OSS: dict[str, Any] = dict(hidden=2880, ffn=2880, activation=Activation("silu", "interleaved", 1.702, 7.0, 1.0))
NEMOTRON: dict[str, Any] = dict(hidden=2688, ffn=1856, activation=Activation("relu2"))

TILES = triton_kernel._dots.configs


INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Of tensor cores."""


def shape(value: Any) -> str:
    if isinstance(value, int):
        return f"{value // 10}.{value % 10}"
    tile = value
    return "x".join(str(tile.kwargs[f"BLOCK_{letter}"]) for letter in "TFD") + f", {tile.num_warps} warps"


def kept_in_registers(compiled: Compiled) -> bool:
    return compiled.spilled == 0


@pytest.mark.parametrize(
    ("tile", "capability"), [*((t, 90) for t in TILES), *((t, 100) for t in TILES[::3])], ids=shape
)
def test_each_tile_keeps_to_registers_and_shared_memory(tile: Any, capability: int) -> None:
    compiled = fused_kernel(QWEN3, tile, capability)
    assert kept_in_registers(compiled)
    assert compiled.blocks >= 1
    assert INSTRUCTIONS[capability] in compiled.ptx


@pytest.mark.parametrize(
    ("layer", "weights", "transposed", "capability"),
    [
        (QWEN3, "bf16", False, 80),
        (GPT_OSS, "bf16", True, 80),
        (GPT_OSS, "bf16", True, 90),
        (GPT_OSS, "bf16", True, 100),
        (NEMOTRON, "fp32", False, 90),
    ],
    ids=["qwen3_moe", *["gpt_oss"] * 3, "nemotron_h under autocast"],
)
def test_other_layers_and_gpus(layer: dict[str, Any], weights: str, transposed: bool, capability: int) -> None:
    compiled = fused_kernel(layer, TILES[3], capability, weights, transposed)
    assert INSTRUCTIONS[capability] in compiled.ptx
    assert compiled.blocks >= 1


@pytest.mark.parametrize(
    ("layer", "biased", "capability"), [(QWEN3, False, 90), (GPT_OSS, True, 90), (GPT_OSS, True, 100)]
)
def test_the_epilogue_spills_nothing_and_fills_the_gpu(layer: dict[str, Any], biased: bool, capability: int) -> None:
    """It waits for memory, so a third of all threads should be there to wait."""
    compiled = epilogue(layer, capability, biased)
    assert kept_in_registers(compiled)
    assert compiled.blocks * compiled.threads >= THREADS // 3


def test_spills_are_seen() -> None:
    """Accumulators of 128 x 128 in half as many threads, each of which has as many registers."""
    tile = triton.Config({"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 32, "GROUP_T": 16}, num_warps=4, num_stages=3)
    assert not kept_in_registers(fused_kernel(QWEN3, tile, 90))


def test_what_does_not_fit_is_seen() -> None:
    tile = triton.Config({"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "GROUP_T": 16}, num_warps=8, num_stages=6)
    compiled = fused_kernel(QWEN3, tile, 90)
    assert compiled.shared > SHARED_KIB[90][0] << 10
    assert compiled.blocks == 0


def test_the_same_code_whatever_triton_does_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """With floating-point operations that are fused or not: versions of Triton differ in that."""

    def codes(**options: Any) -> list[Any]:
        found = []
        for default in ("0", "1"):
            monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
            compiled = fused_kernel(QWEN3, TILES[-1], 90, **options)
            found.append((compiled.ptx, compiled.cubin))
        return found

    fixed, of_others = codes(), codes(options={})
    assert fixed[0] == fixed[1] == of_others[0]
    assert of_others[0] != of_others[1]
