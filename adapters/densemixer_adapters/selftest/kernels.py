"""The fused Triton kernel, and all experts at once, against float64: a small matrix of what they are compiled for."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch

from densemixer_adapters.selftest.outcome import Outcome, compared
from densemixer_adapters.selftest.products import TOLERANCE, layout
from densemixer_adapters.selftest.reference import relative_error
from densemixer_adapters.selftest.samples import CLAMPED, SILU, Sizes, experts, rows, truth
from densemixer_core import Activation
from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.ways import ONE_BY_ONE, ways

TOKENS = 37 if INTERPRETED else 2100
"""Some tiles, and a part of one; more tiles than a group of them has."""
WHOLE = 32 if INTERPRETED else 256
"""A multiple of each tile's width, so that nothing is masked, as in most models."""
EXPERTS = 4


class Case(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        activation: The experts'.
        whole: Whether hidden and ffn are multiples of each tile's widths; others are masked.
        like_gpt_oss: See `samples.experts`.
        at_a_time: For so many experts' results all at once has room; for a part of one it splits the tokens too.
    """

    activation: Activation
    whole: bool
    like_gpt_oss: bool
    at_a_time: float


CASES = (
    Case(SILU, True, False, 3),
    Case(SILU, False, True, 0.4),
    # The others in one dtype: they compute nothing else, and compiling takes a GPU most of the time.
    Case(CLAMPED, True, True, 0.4),
    Case(Activation("relu2"), False, False, 3),
    # Tiles are tried for none of these: those of the first case are known by then.
    *(Case(Activation(function, "concatenated"), True, False, 3) for function in ("gelu", "gelu_tanh", "relu")),
)
IN_EACH_DTYPE = 2


@torch.no_grad()
def check_kernel(device: str) -> Iterator[Outcome]:
    if device == "cpu" and not INTERPRETED:
        yield Outcome("kernel", "fused kernel", "skipped", "needs a GPU; TRITON_INTERPRET=1 tries it on a CPU, slowly")
        return
    if importlib.util.find_spec("triton") is None:
        yield Outcome("kernel", "fused kernel", "skipped", "needs triton")
        return
    # The interpreter computes in float32 anyway.
    for dtype in [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]:
        every = INTERPRETED or dtype == torch.bfloat16
        for case in CASES if every else CASES[:IN_EACH_DTYPE]:
            yield from _each_way(case, dtype, device)


def _each_way(case: Case, dtype: torch.dtype, device: str) -> Iterator[Outcome]:
    """But that of the products one by one."""
    sizes = Sizes(TOKENS, *((WHOLE, WHOLE) if case.whole else (WHOLE + 5, WHOLE - 11)), EXPERTS)
    stacked = experts(dtype, device, case.like_gpt_oss, case.activation, sizes, formula=True)
    stacked = dataclasses.replace(stacked, weights=stacked.weights._replace(scale=None))  # which ways leave out
    x, g = rows(dtype, device, sizes)
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    allowed = TOLERANCE[torch.float16 if tf32 else dtype]
    what = ", ".join(
        (
            str(dtype).removeprefix("torch."),
            layout(case.like_gpt_oss),
            "whole tiles" if case.whole else "parts of tiles",
            f"{case.activation.function} {case.activation.gate or 'without gates'}",
        )
    )
    width = sizes.ffn * (1 if case.activation.gate is None else 2)
    workspace = int(case.at_a_time * sizes.tokens * (width + sizes.ffn) * dtype.itemsize)
    for name, way in ways(stacked, workspace).items():
        if name == ONE_BY_ONE:
            continue
        try:
            dots = way(x, g)
        except Exception as error:  # of Triton's compiler, the driver, memory: there are many kinds
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            yield Outcome("kernel", f"{name}, {what}", "failed", found)
            continue
        if (bias := stacked.weights.down_bias) is not None:
            dots = dots + bias.float() @ g.float().t()
        yield compared("kernel", f"{name}, {what}", relative_error(dots.t(), truth(x, g, stacked)), allowed)
