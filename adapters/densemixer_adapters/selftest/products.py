"""The core's inner products against float64: all of them, and those of a budget; both layouts of the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from densemixer_adapters.selftest.outcome import Outcome, compared, unbiased
from densemixer_adapters.selftest.reference import relative_error
from densemixer_adapters.selftest.samples import SMALL, experts, rows, truth
from densemixer_core import Known, expert_dots, sampled_dots

DRAWS = 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
WORKSPACE = 1 << 17
"""Bytes for which the pairs of a budget are split, in each dtype."""


def layout(like_gpt_oss: bool) -> str:
    return "[in, out] with biases" if like_gpt_oss else "[out, in]"


@torch.no_grad()
def check_products(device: str) -> Iterator[Outcome]:
    for dtype, allowed in TOLERANCE.items():
        for like_gpt_oss in (False, True):
            stacked = experts(dtype, device, like_gpt_oss)
            x, g = rows(dtype, device)
            expected = truth(x, g, stacked)
            case = f"{str(dtype).removeprefix('torch.')}, {layout(like_gpt_oss)}"
            yield compared("products", case, relative_error(expert_dots(x, g, stacked), expected), allowed)
            every_pair = sampled_dots(x, g, known(expected), expected.numel(), 0, stacked, None, WORKSPACE)
            yield compared("products", f"{case}, all pairs drawn", relative_error(every_pair, expected), allowed)
    yield _unbiased(device)


def known(dots: Tensor) -> Known:
    """⟨g, y⟩/Σw as of a layer that mixes all experts: a control that isn't zero, and says something."""
    along = dots.mean(1, keepdim=True) * dots.shape[1] ** 0.5
    return Known(torch.ones_like(dots, dtype=torch.float32), along.float(), 1.0)


def _unbiased(device: str) -> Outcome:
    stacked = experts(torch.float32, device, False)
    x, g = rows(torch.float32, device)
    expected = truth(x, g, stacked)
    count = SMALL.tokens * SMALL.experts // 8
    draws = [sampled_dots(x, g, known(expected), count, seed, stacked) for seed in range(DRAWS)]
    return unbiased("products", f"budget 1/8, mean of {DRAWS} draws", torch.stack(draws), expected)
