"""Whether the fused kernel computes ⟨g, E_j(x)⟩ for a layer, and its call.

Nobody has measured the kernel on a GPU, so it has to prove itself on each: at the first backward of layers of one shape
it is compared with the products expert by expert, on random tokens, and is used where it gives the same numbers and is
faster. This takes its autotuning, which is seconds, some 300 MiB for that time, and synchronises with the device; later
calls do none of it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from densemixer_core import products
from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.activations import Activation
from densemixer_core.products import room_for_dots, scaled
from densemixer_core.weights import ExpertLayout, ExpertWeights, StackedExperts

logger = logging.getLogger("densemixer")

_INSTALLED = importlib.util.find_spec("triton") is not None

# ‖kernel − products‖ / ‖products‖: a few roundings of each number, and for float32 what TF32 does to it.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 4e-3}
_TRIAL_TOKENS = 16 if INTERPRETED else 4096

_Dots = Callable[[Tensor, Tensor], Tensor]

_used: dict[tuple[object, ...], bool] = {}


def supported(x: Tensor, experts: StackedExperts, dtype: torch.dtype) -> bool:
    """Whether the kernel can compute with these experts. Looks at no values, and can be traced by torch.compile.

    Not under ``torch.use_deterministic_algorithms``: what is faster is found by timing.

    Args:
        x: The experts' input, [tokens, hidden].
        experts: The experts of the layer.
        dtype: The dtype of the matrix products.
    """
    return (
        (x.is_cuda or INTERPRETED)
        and _INSTALLED
        and experts.layout.formula is not None
        and experts.layout.post_norm is None
        and dtype in _TOLERANCE
        and x.shape[0] > 0
        and not torch.are_deterministic_algorithms_enabled()
    )


def expert_dots(x: Tensor, g: Tensor, experts: StackedExperts, dtype: torch.dtype, workspace_bytes: int) -> Tensor:
    """`densemixer_core.expert_dots` for what is `supported`, with the same arguments and result."""
    up, down, up_bias, down_bias, scale, _ = experts.weights
    layout = experts.layout
    assert layout.formula is not None
    x, g = x.to(dtype).contiguous(), g.to(dtype).contiguous()
    formula = layout.formula
    dots = room_for_dots(x, g, len(down), layout)
    dots[: len(down)] = _fused(
        x,
        g,
        up,
        down,
        up_bias,
        formula.function,
        formula.gate,
        formula.alpha,
        formula.limit,
        formula.offset,
        layout.transposed,
        workspace_bytes,
    )
    if down_bias is not None:
        dots[: len(down)] += down_bias.to(dtype) @ g.t()
    return scaled(dots, scale).t()


@torch.library.custom_op("densemixer::fused_expert_dots", mutates_args=())
def _fused(
    x: Tensor,
    g: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    function: str,
    gate: str | None,
    alpha: float,
    limit: float,
    offset: float,
    transposed: bool,
    workspace_bytes: int,
) -> Tensor:
    """[experts, tokens] of the stacked experts without their output's bias and scale. torch.compile looks no deeper."""
    from densemixer_core.kernel.triton_kernel import launch

    activation = Activation(function, gate, alpha, limit, offset)
    experts = StackedExperts(ExpertWeights(up, down, up_bias), ExpertLayout(activation, transposed))

    def by_kernel(x: Tensor, g: Tensor) -> Tensor:
        return launch(x, g, up, down, up_bias, activation, transposed)

    def by_products(x: Tensor, g: Tensor) -> Tensor:
        return products.expert_dots(x, g, experts, x.dtype, workspace_bytes).t()

    precision = torch.get_float32_matmul_precision()
    layer = (x.device, x.dtype, precision, up.dtype, up.shape, down.shape, up_bias is None, activation, transposed)
    if layer not in _used:
        # Without tensor cores there is nothing to gain, and the kernel takes a minute to compile.
        plain = x.is_cuda and x.dtype == torch.float32 and precision == "highest"
        _used[layer] = not plain and _prove(by_kernel, by_products, x)
    return (by_kernel if _used[layer] else by_products)(x, g)


@_fused.register_fake
def _(x: Tensor, g: Tensor, up: Tensor, *_: object) -> Tensor:
    return x.new_empty(up.shape[0], x.shape[0], dtype=torch.float32)


def _prove(by_kernel: _Dots, by_products: _Dots, like: Tensor) -> bool:
    """Whether the kernel gives the numbers of the products, and on a GPU faster.

    On numbers of its own: gradients may be zero, or infinite under a `GradScaler`.
    """
    what = f"DenseMixer's fused kernel, for experts with {like.shape[1]} inputs in {like.dtype} on {like.device},"
    random = torch.Generator(like.device).manual_seed(0)
    x, g = torch.randn(2, _TRIAL_TOKENS, like.shape[1], generator=random, device=like.device, dtype=like.dtype)
    expected = by_products(x, g)
    try:
        off = ((by_kernel(x, g) - expected).norm() / expected.norm()).item()
        if not off <= _TOLERANCE[like.dtype]:
            logger.warning("%s is off by %.2g, so they are computed one by one. Please report this.", what, off)
            return False
        return not like.is_cuda or _is_faster(by_kernel, by_products, x, g, what)
    except Exception as error:  # of Triton's compiler, a C compiler, the driver, memory: there are many kinds
        logger.warning("%s doesn't run, so they are computed one by one: %s: %s", what, type(error).__name__, error)
        return False


def _is_faster(by_kernel: _Dots, by_products: _Dots, x: Tensor, g: Tensor, what: str) -> bool:
    from triton.testing import do_bench

    kernel, plain = (do_bench(lambda run=run: run(x, g), return_mode="median") for run in (by_kernel, by_products))
    logger.info("%s takes %.3g ms for %d tokens, one by one they take %.3g ms", what, kernel, len(x), plain)
    return bool(kernel < plain)
