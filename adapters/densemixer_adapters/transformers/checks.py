"""Whether a layer is what DenseMixer takes it for: its routing, and its experts' output, on the tokens at hand.

The gradient follows from what `densemixer_adapters.transformers.routers` declares of the router, and from the experts'
weights. Both are compared with what the layer really did: in its first training forward with tokens, in the first one
after somebody changed its hooks, wrappers or forwards, and now and then in between, for what can't be seen to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

Evaluate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`densemixer_core.routed_output` with the experts at hand."""

EVERY = 64
"""How many training forwards of a layer go by between two checks. One waits for the device, and evaluates the selected
experts of `TOKENS` tokens."""

TOKENS = 4


class Recurring:
    """When a check is due: in a layer's first training forward, and `EVERY` forwards after one in which it was made."""

    def __init__(self) -> None:
        self._left = 0

    def due(self) -> bool:
        """To be asked once in each training forward."""
        self._left -= 1
        return self._left < 0

    def made(self) -> None:
        """In this forward."""
        self._left = EVERY - 1


class OutputMismatchError(RuntimeError):
    """A layer's experts return something else than the weighted sum of what their weights compute."""


def signature(*modules: nn.Module) -> tuple[Any, ...]:
    """What changes when somebody hooks into one of these modules, or replaces its class or its forward."""
    own = [
        (type(module), id(vars(module).get("forward")), *module._forward_pre_hooks, *module._forward_hooks)
        for module in modules
    ]
    return (*own, tuple(_global_forward_pre_hooks), tuple(_global_forward_hooks))


def comparable(block: nn.Module, experts: nn.Module) -> bool:
    """Whether the experts' output can be compared.

    Not while dropout within them is at work; and not where ZeRO-3 counts what runs inside the block, since to compare
    runs parts of the experts once more, in a number that differs between ranks (see `densemixer_adapters.deepspeed`).
    """
    if any(isinstance(module, _DropoutNd) and module.training and module.p for module in experts.modules()):
        return False
    partitioned = any(hasattr(parameter, "ds_id") for parameter in experts.parameters())
    return not partitioned or getattr(block, "_z3_leaf", False)


def check_output(
    output: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    evaluate: Evaluate,
    dtype: torch.dtype,
    tokens: int = TOKENS,
) -> None:
    """Compare the output of a few tokens with Σ_selected w_j E_j(x). Synchronises with the device.

    Args:
        output: What the experts returned, [tokens, hidden].
        x, index, weights: As in `densemixer_core.routed_output`.
        evaluate: That, which is called once, and for no tokens if there are none.
        dtype: The dtype in which the host computes.
        tokens: How many are compared at most.

    Raises:
        OutputMismatchError: They differ by more than rounding can explain.
    """
    rows = torch.linspace(0, len(x) - 1, min(tokens, len(x)), device=x.device).long()
    with torch.autocast(x.device.type, enabled=False):
        expected, size = evaluate(x[rows], index[rows], weights[rows])
    found = output[rows].to(expected.dtype)
    off = torch.linalg.vector_norm(found - expected, dim=-1)
    # A dozen roundings of each number, and for float32 what TF32 does to it; below the smallest normal number (of
    # float16, that matters) rounding is no longer relative.
    kinds = [torch.finfo(kind) for kind in (dtype, x.dtype, output.dtype, weights.dtype)]
    smallest = index.shape[1] * math.sqrt(x.shape[1]) * max(kind.tiny for kind in kinds)
    allowed = max(1e-2, *(16 * kind.eps for kind in kinds)) * (size + smallest)
    # What isn't finite, or is nothing at all, says nothing.
    telling = off.isfinite() & (size > 0)
    if not bool((telling & (off > allowed)).any().item()):
        return
    found, expected = found[telling], expected[telling]
    share = ((off / size)[telling].max()).item()
    factor = ((found * expected).sum() / expected.square().sum()).item()
    rest = (torch.linalg.vector_norm(found - factor * expected) / torch.linalg.vector_norm(found)).item()
    how = f"it is {factor:.3g} times that" if rest < 0.1 else f"it is off by {100 * share:.2g} % of its size"
    raise OutputMismatchError(f"their output isn't the sum of w_j·E_j(x) over the selected experts: {how}")
