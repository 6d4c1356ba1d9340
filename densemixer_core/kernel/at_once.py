# ruff: noqa: N803  (constants in capitals, as Triton has them)
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""All experts at once: two batched matrix products of many experts, and one small kernel for what follows.

The products are the vendor's library's, x by the up projections and g by the down projections. The kernel reads their
results once, and makes of them one number for each token and expert: activation, product and sum in float32. As many
experts as fit into the workspace go through together, so the weights are read once for some thousand tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.activations import Activation
from densemixer_core.kernel.triton_kernel import OPTIONS, _hidden, formula_constants

_MOST_TOKENS = 4096
"""So many at a time: beyond, a product gets no faster, and fewer experts fit."""

BLOCKS = {"BLOCK_T": 16, "BLOCK_F": 16} if INTERPRETED else {"BLOCK_T": 8, "BLOCK_F": 128}
"""Tokens and ffn columns of a tile: 16 bytes of each tensor for each thread, and few registers."""


@triton.jit(do_not_specialize=["rows", "out_expert"])
def _epilogue(
    inner,  # [experts, rows, width]
    outer,  # [experts, rows, FFN]
    up_bias,  # [experts, width]
    out,  # [experts, rows], with another stride from expert to expert
    rows,
    out_expert,
    FFN: tl.constexpr,
    GATED: tl.constexpr,
    STEP: tl.constexpr,  # from one gate to the next
    SHIFT: tl.constexpr,  # from a gate to its up value
    BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_F)
    WIDTH: tl.constexpr = (1 + GATED) * FFN
    COMPUTED: tl.constexpr = inner.dtype.element_ty
    inner += (expert * rows + row)[:, None] * WIDTH
    outer += (expert * rows + row)[:, None] * FFN
    up_bias += expert * WIDTH
    dots = tl.zeros([BLOCK_T], tl.float32)
    for f in range(0, FFN, BLOCK_F):
        column = f + columns
        inside = (row < rows)[:, None] & (column < FFN)[None, :]
        p = tl.load(outer + column[None, :], inside, 0.0).to(tl.float32)
        a = tl.load(inner + column[None, :] * STEP, inside, 0.0).to(tl.float32)
        b = a
        if GATED:
            b = tl.load(inner + (column[None, :] * STEP + SHIFT), inside, 0.0).to(tl.float32)
        if BIAS:
            bias = up_bias + column * STEP
            a += tl.load(bias, column < FFN, 0.0).to(COMPUTED).to(tl.float32)[None, :]
            if GATED:
                b += tl.load(bias + SHIFT, column < FFN, 0.0).to(COMPUTED).to(tl.float32)[None, :]
        dots += tl.sum(_hidden(a, b, GATED, FUNCTION, ALPHA, LIMIT, OFFSET) * p, 1)
    tl.store(out + expert * out_expert + row, dots, row < rows)


def launch(
    x: Tensor,
    g: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    activation: Activation,
    transposed: bool,
    workspace_bytes: int,
) -> Tensor:
    """`triton_kernel.launch`, with the same arguments and result.

    Args:
        workspace_bytes: Upper bound on the temporaries, beside a copy of one expert's weights in another dtype.
    """
    if not transposed:
        up, down = up.mT, down.mT
    out = torch.empty(len(up), len(x), dtype=torch.float32, device=x.device)
    rows, experts = _part(x, up, down, workspace_bytes)
    for first in range(0, len(up), experts):
        part = slice(first, first + experts)
        some_up, some_down = up[part].to(x.dtype), down[part].to(x.dtype)
        bias = None if up_bias is None else up_bias[part].contiguous()
        for x_rows, g_rows, dots in zip(x.split(rows), g.split(rows), out[part].split(rows, 1), strict=True):
            _one_part(x_rows, g_rows, some_up, some_down, bias, activation, dots)
        del some_up, some_down  # before the next ones are made
    return out


def _one_part(
    x: Tensor, g: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, activation: Activation, out: Tensor
) -> None:
    """Into ``out``, [experts, rows], from weights [experts, in, out] in the dtype of x. Frees what it makes."""
    experts, rows = out.shape
    inner = torch.bmm(x.expand(experts, -1, -1), up)
    outer = torch.bmm(g.expand(experts, -1, -1), down.mT)
    with torch.cuda.device_of(x):
        _epilogue[triton.cdiv(rows, BLOCKS["BLOCK_T"]), experts](
            inner,
            outer,
            x if up_bias is None else up_bias,
            out,
            rows,
            out.stride(0),
            **formula_constants(down.shape[1], activation, biased=up_bias is not None),
            **BLOCKS,
            **OPTIONS,
        )


def _part(x: Tensor, up: Tensor, down: Tensor, workspace_bytes: int) -> tuple[int, int]:
    """How many tokens and experts go through at a time.

    A copy of the weights of one expert, where they have another dtype, comes on top as it does one by one; those of
    further experts count.
    """
    pair = (up.shape[2] + down.shape[1]) * x.element_size()
    rows = max(1, min(len(x), _MOST_TOKENS, workspace_bytes // pair))
    copied = sum(
        weight[0].numel() * x.element_size()
        for weight in (up, down)
        if weight.dtype != x.dtype or 1 not in weight.stride()[1:]
    )
    return rows, max(1, (workspace_bytes + copied) // (rows * pair + copied))
