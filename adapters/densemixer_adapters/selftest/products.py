"""The core's inner products against float64: both orientations of weights, biases, a budget; and the other ways."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from densemixer_adapters.selftest.outcome import Outcome, compared
from densemixer_adapters.selftest.reference import relative_error
from densemixer_core import Activation, ExpertLayout, ExpertWeights, Known, StackedExperts, expert_dots, sampled_dots
from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.ways import ONE_BY_ONE, ways

TOKENS, HIDDEN, FFN, EXPERTS = 96, 64, 32, 8
SILU = Activation("silu", "concatenated")
DRAWS = 64
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def experts(dtype: torch.dtype, device: str, transposed: bool, biased: bool, formula: bool = False) -> StackedExperts:
    """Random ones. Without ``formula`` only the products one by one compute them."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        numbers: Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return numbers.to(device, dtype)

    up, down = random(EXPERTS, 2 * FFN, HIDDEN), random(EXPERTS, HIDDEN, FFN)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (random(EXPERTS, 2 * FFN), random(EXPERTS, HIDDEN)) if biased else (None, None)
    return StackedExperts(
        ExpertWeights(up, down, *biases), ExpertLayout(SILU, transposed, formula=SILU if formula else None)
    )


def rows(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x and g, [tokens, hidden]."""
    x, g = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return x, g


def truth(x: Tensor, g: Tensor, stacked: StackedExperts) -> Tensor:
    """[tokens, experts] by the formula, in float64, expert by expert."""
    columns = []
    for expert in range(EXPERTS):
        up, down, up_bias, down_bias = (None if w is None else w[expert].double() for w in stacked.weights[:4])
        assert up is not None
        assert down is not None
        up, down = (up, down) if stacked.layout.transposed else (up.t(), down.t())
        inner = x.double() @ up + (0.0 if up_bias is None else up_bias)
        gate, value = inner.chunk(2, -1)
        output = (gate * torch.sigmoid(gate) * value) @ down + (0.0 if down_bias is None else down_bias)
        columns.append((output * g.double()).sum(-1))
    return torch.stack(columns, 1)


@torch.no_grad()
def check_products(device: str) -> Iterator[Outcome]:
    for dtype, allowed in _TOLERANCE.items():
        for transposed in (False, True):
            stacked = experts(dtype, device, transposed, biased=transposed)
            x, g = rows(dtype, device)
            case = f"{str(dtype).removeprefix('torch.')}, {'[in, out] with biases' if transposed else '[out, in]'}"
            yield compared("products", case, relative_error(expert_dots(x, g, stacked), truth(x, g, stacked)), allowed)
    yield _unbiased(device)


def _unbiased(device: str) -> Outcome:
    """The distance of the mean over draws from the truth, over what the scatter of the draws lets expect."""
    stacked = experts(torch.float32, device, False, False)
    x, g = rows(torch.float32, device)
    known = Known(torch.ones(TOKENS, EXPERTS, device=device), torch.zeros(TOKENS, 1, device=device))
    count = TOKENS * EXPERTS // 8
    draws = torch.stack([sampled_dots(x, g, known, count, seed, stacked) for seed in range(DRAWS)]).double()
    off = (draws.mean(0) - truth(x, g, stacked)).square().mean()
    expected = (draws.var(0) / DRAWS).mean()
    ratio = float((off / expected).sqrt())
    state: Literal["ok", "failed"] = "ok" if ratio < 1.3 else "failed"
    found = f"{ratio:.2f} of the error that the draws' scatter lets expect, allowed 1.30"
    return Outcome("products", f"budget 1/8, mean of {DRAWS} draws", state, found)


@torch.no_grad()
def check_kernel(device: str) -> Iterator[Outcome]:
    if device == "cpu" and not INTERPRETED:
        yield Outcome("kernel", "fused kernel", "skipped", "needs a GPU; TRITON_INTERPRET=1 tries it on a CPU, slowly")
        return
    if importlib.util.find_spec("triton") is None:
        yield Outcome("kernel", "fused kernel", "skipped", "needs triton")
        return
    dtypes = [torch.float32] if INTERPRETED else [*_TOLERANCE]  # the interpreter computes in float32 anyway
    for dtype in dtypes:
        for transposed in (False, True):
            yield from _elsewhere(dtype, device, transposed)


def _elsewhere(dtype: torch.dtype, device: str, transposed: bool) -> Iterator[Outcome]:
    """Each way but that of the products one by one."""
    stacked = experts(dtype, device, transposed, biased=transposed, formula=True)
    x, g = rows(dtype, device)
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    allowed = _TOLERANCE[torch.float16 if tf32 else dtype]
    layout = f"{str(dtype).removeprefix('torch.')}, {'[in, out] with biases' if transposed else '[out, in]'}"
    for name, way in ways(stacked, 1 << 28).items():
        if name == ONE_BY_ONE:
            continue
        try:
            dots = way(x, g)
        except Exception as error:  # of Triton's compiler, the driver, memory: there are many kinds
            yield Outcome(
                "kernel", f"{name}, {layout}", "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"
            )
            continue
        if (bias := stacked.weights.down_bias) is not None:
            dots = dots + bias.float() @ g.float().t()
        yield compared("kernel", f"{name}, {layout}", relative_error(dots.t(), truth(x, g, stacked)), allowed)
