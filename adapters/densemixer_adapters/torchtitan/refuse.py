"""What DenseMixer doesn't work with in torchtitan: by what a layer is built of, and by what is done to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_core.routing import SCORE_FUNCTIONS

_QUANTISED = ("computes with quantised weights, which DenseMixer doesn't read", "leave out its converter")
_NOT_RUN = ("has not been run with DenseMixer", 'build the model with moe_comm_backend="standard"')
KNOWN = {
    "layer": ("MoE", "GptOssMoE"),
    "router": ("TokenChoiceTopKRouter",),
    "experts": ("GroupedExperts", "GptOssGroupedExperts"),
    "token dispatcher": ("LocalTokenDispatcher", "AllToAllTokenDispatcher"),
}
"""The classes of torchtitan that a layer may be built of. A subclass may compute something else."""

REASONS = {
    "Float8GroupedExperts": _QUANTISED,
    "MXFP8GroupedExperts": _QUANTISED,
    "Float8GptOssGroupedExperts": _QUANTISED,
    "MXFP8GptOssGroupedExperts": _QUANTISED,
    "TorchAOTokenDispatcher": _QUANTISED,
    "FusedGroupedExperts": ("has its weights in another layout", "leave out its override"),
    "DeepEPTokenDispatcher": _NOT_RUN,
    "HybridEPTokenDispatcher": _NOT_RUN,
    "MinimalAsyncEPTokenDispatcher": _NOT_RUN,
}
"""Why other classes of torchtitan are refused, and what to do instead."""


def refuse_layer(name: str, moe: Any) -> None:
    """Raise if DenseMixer can't train this ``MoE``.

    Raises:
        UnsupportedModelError: The message names the layer, the reason and the fix.
    """
    routed = moe.routed_experts
    capacity = getattr(routed.token_dispatcher, "non_blocking_capacity_factor", None)
    if capacity is not None:
        _refuse(
            name,
            f"its non_blocking_capacity_factor is {capacity}: tokens may be dropped, so that an expert's output "
            "depends on the other tokens",
            "leave it None",
        )
    built_of = {
        "layer": moe,
        "router": moe.router,
        "experts": routed.inner_experts,
        "token dispatcher": routed.token_dispatcher,
    }
    for what, part in built_of.items():
        kind = type(part)
        if kind.__name__ not in KNOWN[what] or not kind.__module__.startswith("torchtitan."):
            reason, fix = REASONS.get(
                kind.__name__, ("is none that DenseMixer knows", f"build it with {' or '.join(KNOWN[what])}")
            )
            _refuse(name, f"its {what} is a {kind.__name__}, which {reason}", fix)
    if moe.router._debug_force_load_balance:
        _refuse(
            name,
            "debug.moe_force_load_balance selects experts in turn, which doesn't follow from the scores",
            "switch it off",
        )
    if moe.router.score_func not in SCORE_FUNCTIONS:
        _refuse(name, f"its score_func {moe.router.score_func} is unknown", f"use {' or '.join(SCORE_FUNCTIONS)}")


def refuse_compiled(parts: Sequence[nn.Module]) -> None:
    """Raise if any module is compiled in place.

    Raises:
        UnsupportedModelError: The message names the module, the reason and the fix.
    """
    for part in parts:
        for name, module in part.named_modules():
            if getattr(module, "_compiled_call_impl", None) is not None:
                refuse_compiling(name or type(part).__name__)


def refuse_compiling(name: str) -> NoReturn:
    """Say that what is compiled isn't served."""
    _refuse(
        name,
        "it is compiled (compile.enable, with the component model), and what DenseMixer does in the backward has not "
        "been shown to work there",
        'leave "model" out of compile.components',
    )


def refuse_capture(name: str) -> NoReturn:
    """Say that CUDA graphs aren't served."""
    _refuse(
        name,
        "a CUDA graph is being captured, and what DenseMixer does in the backward has not been shown to work there",
        "set training.disable_cuda_graphs",
    )


def _refuse(name: str, reason: str, fix: str) -> NoReturn:
    raise UnsupportedModelError(f"{name}: DenseMixer can't train it: {reason}. Either {fix}, or switch DenseMixer off.")
