"""Three ways to compute ⟨g, E_j(x)⟩ for a layer's experts, and which of them this machine is fastest with.

Nobody has measured them on a GPU, so they have to prove themselves on each: at the first backward of layers of one
shape the fused kernel and the products over all experts at once are compared with the products expert by expert, on
random tokens, unless the experts return zeros yet. Of those that give the same numbers the fastest is used. This takes
the kernel's autotuning, which is seconds, some 300 MiB beside the workspace for that time, and synchronises with the
device; later calls do none of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from densemixer_core import products
from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.trial import trial_tokens
from densemixer_core.weights import ExpertLayout, ExpertWeights, StackedExperts

logger = logging.getLogger("densemixer")

# ‖way − products‖ / ‖products‖: a few roundings of each number, and for float32 what TF32 does to it.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 4e-3}

Way = Callable[[Tensor, Tensor], Tensor]
"""From x and g, [tokens, hidden] each, contiguous and in the dtype of the products, to [experts, tokens]."""

ONE_BY_ONE = "one by one"


def ways(experts: StackedExperts, workspace_bytes: int) -> dict[str, Way]:
    """By name. They leave out the bias and scale of the experts' outputs, and need the formula of the activation."""
    up, down, up_bias, *_ = experts.weights
    formula, transposed = experts.layout.formula, experts.layout.transposed
    assert formula is not None
    plain = StackedExperts(ExpertWeights(up, down, up_bias), ExpertLayout(formula, transposed))

    def fused_kernel(x: Tensor, g: Tensor) -> Tensor:
        from densemixer_core.kernel import triton_kernel

        return triton_kernel.launch(x, g, up, down, up_bias, formula, transposed)

    def all_at_once(x: Tensor, g: Tensor) -> Tensor:
        from densemixer_core.kernel import at_once

        return at_once.launch(x, g, up, down, up_bias, formula, transposed, workspace_bytes)

    def one_by_one(x: Tensor, g: Tensor) -> Tensor:
        return products.expert_dots(x, g, plain, x.dtype, workspace_bytes).t()

    return {"fused kernel": fused_kernel, "all at once": all_at_once, ONE_BY_ONE: one_by_one}


def fastest(candidates: dict[str, Way], like: Tensor) -> str | None:
    """The name of the fastest of those `ways` that give the numbers of the products one by one.

    On numbers of its own: gradients may be zero, or infinite under a `GradScaler`.

    Args:
        candidates: The ways.
        like: An input of theirs.

    Returns:
        None while the experts return nothing but zeros, as some do in the beginning: there is nothing to compare.
    """
    tokens, hidden = trial_tokens(len(like)), like.shape[1]
    what = f"experts with {hidden} inputs in {like.dtype} on {like.device}, {tokens} tokens"
    random = torch.Generator(like.device).manual_seed(0)
    x, g = torch.randn(2, tokens, hidden, generator=random, device=like.device, dtype=like.dtype)
    expected = candidates[ONE_BY_ONE](x, g)
    size = expected.norm().item()
    if size == 0:
        return None
    if not math.isfinite(size):
        logger.warning("DenseMixer: %s: the experts' weights give no finite numbers to compare ways with", what)
        return ONE_BY_ONE
    taken = {}
    for name, way in candidates.items():
        try:
            off = ((way(x, g) - expected).norm() / expected.norm()).item()
            if off <= TOLERANCE[like.dtype]:
                taken[name] = _milliseconds(name, lambda way=way: way(x, g))  # type: ignore[misc]
            else:
                logger.warning(
                    "DenseMixer: %s: %s is off by %.2g, so it isn't used. Please report this.", what, name, off
                )
        except Exception as error:  # of Triton's compiler, a C compiler, the driver, memory: there are many kinds
            kind = type(error).__name__
            logger.warning("DenseMixer: %s: %s doesn't run, so it isn't used: %s: %s", what, name, kind, error)
    best = min(taken, key=lambda name: taken[name], default=ONE_BY_ONE)
    times = ", ".join(f"{name} {time:.3g} ms" for name, time in taken.items())
    logger.info("DenseMixer: %s: %s; computed %s from now on", what, times, best)
    return best


def _milliseconds(name: str, run: Callable[[], Tensor]) -> float:
    """The median time of a way; 0 where Triton's interpreter runs it, whose times mean nothing."""
    if INTERPRETED:
        return 0.0
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))
