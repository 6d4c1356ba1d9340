"""How much of the routers' gradient comes from unselected experts.

Measured on the way: one small matrix product per layer in the backward, nothing in the forward, no second pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from densemixer_adapters.transformers import DenseMixerHandle, DenseMixerLayer
from densemixer_core.routing import score_gradient_to_logits


class RouterGradients:
    """Collects, between two optimizer steps, the part of each router's gradient that DenseMixer adds.

    Only routers whose weight itself is trained count: neither one under LoRA, nor one whose weight is in a flat
    parameter of FSDP1, has a gradient of its own.

    Args:
        handle: What `densemixer_adapters.transformers.apply_densemixer` returned.

    Attributes:
        layers: The layers of the handle.
        measured: What `measure` found at last:

            - ``router_grad_norm``: the norm of the gradient of all routers' weights;
            - ``router_grad_share_unselected``: ‖added‖ / (‖added‖ + ‖conventional‖), between 0 and 1, where the two sum
              to that gradient.
    """

    def __init__(self, handle: DenseMixerHandle) -> None:
        self.layers = handle.layers
        self.measured: dict[str, float] = {}
        self._added: dict[str, Tensor] = {}  # by layer, [experts, hidden], of this rank
        for layer in self.layers:
            layer.observe = functools.partial(self._observe, layer)

    def measure(self, scale: float = 1.0) -> None:
        """Set `measured` from the gradients as they are now, and start anew. Collective: all ranks call it.

        Args:
            scale: What the loss was multiplied by, for a gradient scaler.
        """
        added, self._added = self._added, {}
        totals = {layer.name: weight.grad for layer in self.layers if (weight := _trained_weight(layer)) is not None}
        # FSDP1 with original parameters has one-dimensional shards here.
        pairs = [(_full(total), name) for name, total in totals.items() if total is not None and total.dim() == 2]
        self.measured = {}
        if not pairs:
            return
        total = torch.cat([tensor.flatten() for tensor, _ in pairs])
        extra = torch.cat(
            [added[name].flatten() if name in added else torch.zeros_like(t).flatten() for t, name in pairs]
        )
        extra = _mean_over_ranks(extra.to(total.device))
        norm, extra_norm, conventional_norm = (t.norm().item() for t in (total, extra, total - extra))
        self.measured["router_grad_norm"] = norm / scale
        whole = extra_norm + conventional_norm
        self.measured["router_grad_share_unselected"] = extra_norm / whole if whole else 0.0

    def _observe(self, layer: DenseMixerLayer, scores: Tensor, x: Tensor) -> Tensor:
        if _trained_weight(layer) is None:
            return scores
        return _Observe.apply(scores, x.detach(), layer.score, functools.partial(self._add, layer.name))  # type: ignore[no-any-return,no-untyped-call]

    def _add(self, name: str, gradient: Tensor) -> None:
        if name in self._added:
            self._added[name] += gradient
        else:
            self._added[name] = gradient


class _Observe(torch.autograd.Function):
    """The identity. Its backward turns the gradient of the scores into that of a linear router's weight."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, x: Tensor, score: str, add: Any) -> Tensor:
        # Saved, not closed over: activation checkpointing frees what is saved until the backward needs it.
        ctx.save_for_backward(scores, x)
        ctx.score, ctx.add = score, add
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        p, x = ctx.saved_tensors
        logits = score_gradient_to_logits(g, p, ctx.score)
        ctx.add((logits.t().to(x.dtype) @ x.reshape(-1, x.shape[-1])).to(torch.promote_types(x.dtype, torch.float32)))
        return g, None, None, None


def _trained_weight(layer: DenseMixerLayer) -> torch.nn.Parameter | None:
    weight = getattr(layer.router, "weight", None)
    return weight if isinstance(weight, torch.nn.Parameter) and weight.requires_grad else None


def _full(gradient: Tensor) -> Tensor:
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return whole.to(torch.promote_types(whole.dtype, torch.float32))


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    """As DDP and FSDP reduce gradients."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor
