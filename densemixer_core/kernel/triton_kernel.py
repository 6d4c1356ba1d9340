# ruff: noqa: N803  (constants in capitals, as Triton has them)
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""The fused kernel: one program computes ⟨g, E_j(x)⟩ for one expert and a tile of tokens.

It walks over tiles of the expert's ffn columns, and for each of them over the hidden dimension, where three products
are accumulated in float32: gate and up from x, and W_downᵀ g. Their product is summed over the columns at once, so the
only thing that is written is one number for each token and expert. No two programs write the same number: the result
is the same in every run.

It has run in Triton's interpreter and been compiled for NVIDIA's compute capabilities 8.0 and 9.0, but has never run
or been timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.activations import Activation
from densemixer_core.kernel.trial import trial_tokens


def _configs() -> list[Any]:
    """Tiles of tokens, ffn columns and the hidden dimension; warps and stages of the loads.

    The wider the first two, the fewer bytes are read for each operation. Three accumulators of 128 x 128 take 192
    registers of each thread of 8 warps, so that is as large as they get.
    """
    if INTERPRETED:  # nothing to time there; small tiles, so that small layers have several
        return [triton.Config({"BLOCK_T": 16, "BLOCK_F": 16, "BLOCK_D": 16, "GROUP_T": 2})]
    shapes = [
        (128, 128, 32, 8, 4),
        (128, 64, 64, 8, 3),
        (64, 128, 64, 8, 3),
        (128, 64, 32, 8, 3),
        (64, 64, 32, 4, 3),
        (64, 32, 32, 4, 3),
    ]
    return [
        triton.Config({"BLOCK_T": t, "BLOCK_F": f, "BLOCK_D": d, "GROUP_T": 16}, num_warps=warps, num_stages=stages)
        for t, f, d, warps, stages in shapes
    ]


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _dot(a, b, sum, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """sum + a·b in the dtype of a; widened, the same numbers for the interpreter, which can't multiply bfloat16."""
    b = b.to(a.dtype)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def _activate(z, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    if FUNCTION == "silu":
        return z * tl.sigmoid(ALPHA * z)
    elif FUNCTION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":  # ½(1 + tanh u) = σ(2u)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif FUNCTION == "relu":
        return tl.maximum(z, 0.0)
    else:
        tl.static_assert(FUNCTION == "relu2")
        return tl.maximum(z, 0.0) * tl.maximum(z, 0.0)


@triton.jit
def _hidden(
    a, b, GATED: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr
):
    """The down projection's input, of gates and up values; without gates, of a alone."""
    if GATED:
        return _activate(tl.minimum(a, LIMIT), FUNCTION, ALPHA) * (tl.minimum(tl.maximum(b, -LIMIT), LIMIT) + OFFSET)
    else:
        return _activate(a, FUNCTION, ALPHA)


# Triton adds the tensors' dtypes to the key.
@triton.autotune(_configs(), key=["about", "experts", "up_in", "HIDDEN", "FFN", "GATED", "STEP", "PRECISION"])
@triton.jit(do_not_specialize=["tokens", "about"])
def _dots(
    x,  # [tokens, HIDDEN]
    g,  # [tokens, HIDDEN]
    up,
    down,
    up_bias,  # [experts, width]
    out,  # [experts, tokens]
    tokens,
    about,  # so many tokens: for the autotuning alone
    experts,
    up_expert,  # strides from here on
    up_in,
    up_out,
    down_expert,
    down_in,
    down_out,
    HIDDEN: tl.constexpr,
    FFN: tl.constexpr,
    GATED: tl.constexpr,
    STEP: tl.constexpr,  # from one gate to the next
    SHIFT: tl.constexpr,  # from a gate to its up value
    BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # Programs that run at the same time share GROUP_T tiles of tokens and a few experts, which stay in the L2 cache.
    program = tl.program_id(0)
    in_group = program % (GROUP_T * experts)
    first = program // (GROUP_T * experts) * GROUP_T
    size = tl.minimum(tl.cdiv(tokens, BLOCK_T) - first, GROUP_T)
    # Where a tile begins takes 64 bits, as the weights of a layer can have more than 2³¹ elements; within one, 32 do.
    expert = (in_group // size).to(tl.int64)
    start = (first + in_group % size).to(tl.int64) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_D)
    left = (tokens - start).to(tl.int32)
    x += start * HIDDEN
    g += start * HIDDEN
    tile = tl.minimum(rows, left - 1)[:, None] * HIDDEN + k[None, :]
    up += expert * up_expert
    down += expert * down_expert
    up_tile = k[:, None] * up_in + columns[None, :] * (STEP * up_out)
    down_tile = k[:, None] * down_out + columns[None, :] * down_in
    MASKED: tl.constexpr = HIDDEN % BLOCK_D != 0 or FFN % BLOCK_F != 0
    COMPUTED: tl.constexpr = x.dtype.element_ty

    dots = tl.zeros([BLOCK_T], tl.float32)
    for f in range(0, FFN, BLOCK_F):
        a = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        b = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        p = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        for d in range(0, HIDDEN, BLOCK_D):
            along = k[None, :] < HIDDEN - d
            inside = (k[:, None] < HIDDEN - d) & (columns[None, :] < FFN - f)
            gate = up + (d * up_in + f * STEP * up_out) + up_tile
            x_tile = _load(x + d + tile, along, MASKED)
            a = _dot(x_tile, _load(gate, inside, MASKED), a, PRECISION, WIDEN)
            if GATED:
                b = _dot(x_tile, _load(gate + SHIFT * up_out, inside, MASKED), b, PRECISION, WIDEN)
            g_tile = _load(g + d + tile, along, MASKED)
            transposed = down + (d * down_out + f * down_in) + down_tile
            p = _dot(g_tile, _load(transposed, inside, MASKED), p, PRECISION, WIDEN)
        if BIAS:
            bias = up_bias + expert * ((1 + GATED) * FFN) + (f + columns) * STEP
            a += _load(bias, columns < FFN - f, MASKED).to(COMPUTED).to(tl.float32)[None, :]
            if GATED:
                b += _load(bias + SHIFT, columns < FFN - f, MASKED).to(COMPUTED).to(tl.float32)[None, :]
        hidden = _hidden(a, b, GATED, FUNCTION, ALPHA, LIMIT, OFFSET)
        dots += tl.sum(hidden * p, 1)
    tl.store(out + expert * tokens + start + rows, dots, mask=rows < left)


OPTIONS = {"enable_fp_fusion": False}
"""A product is rounded before it is added to something, under each version of Triton: their defaults differ. (Matrix
products on tensor cores know no other way.)"""


def formula_constants(ffn: int, activation: Activation, biased: bool) -> dict[str, Any]:
    """What an activation is compiled for."""
    interleaved = activation.gate == "interleaved"
    return {
        "FFN": ffn,
        "GATED": activation.gate is not None,
        "STEP": 2 if interleaved else 1,
        "SHIFT": 1 if interleaved else ffn,
        "BIAS": biased,
        "FUNCTION": activation.function,
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
        "OFFSET": activation.offset,
    }


def constants(hidden: int, ffn: int, activation: Activation, biased: bool) -> dict[str, Any]:
    """What the kernel is compiled for, besides its tiles."""
    return formula_constants(ffn, activation, biased) | {
        "HIDDEN": hidden,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "WIDEN": INTERPRETED,
    }


def launch(
    x: Tensor, g: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, activation: Activation, transposed: bool
) -> Tensor:
    """Σ_f a(W_up x + b_up)_f · (W_downᵀ g)_f for every expert and token.

    Args:
        x: [tokens, hidden], contiguous, in the dtype of the products.
        g: Likewise.
        up: As in `ExpertWeights`, of any dtype; its numbers are rounded to that of ``x`` as they are read.
        down: Likewise.
        up_bias: Likewise, or None.
        activation: The experts' activation.
        transposed: Whether the weights are stored [experts, in, out].

    Returns:
        [experts, tokens], float32.
    """
    tokens, hidden = x.shape
    experts = up.shape[0]
    if not transposed:
        up, down = up.mT, down.mT
    ffn = down.shape[1]
    out = torch.empty(experts, tokens, dtype=torch.float32, device=x.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(tokens, meta["BLOCK_T"]) * experts,)

    with torch.cuda.device_of(x):
        _dots[grid](
            x,
            g,
            up,
            down,
            x if up_bias is None else up_bias.contiguous(),
            out,
            tokens,
            trial_tokens(tokens),
            experts,
            *up.stride(),
            *down.stride(),
            **constants(hidden, ffn, activation, biased=up_bias is not None),
            **OPTIONS,
        )
    return out
