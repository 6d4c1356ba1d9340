"""What becomes of each architecture when DenseMixer is attached to a tiny model of it."""

from __future__ import annotations

import architectures
import torch
from torch import Tensor, nn

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_adapters.transformers.routers import Router, router_of


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output, and the gradients of all parameters, of a loss in a random direction of that output."""
    model.zero_grad()
    output = model(**architectures.inputs(model))[0]
    direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (output * direction).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refusal(model: nn.Module) -> str | None:
    """What DenseMixer says when it refuses the model, at once or at the first training forward."""
    try:
        with apply_densemixer(model):
            step(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def outcome(folder: str) -> list[Router] | str:
    """What is declared of the routers that DenseMixer trains in an architecture, or why it refuses it."""
    routers: list[Router] = []
    for cls in architectures.model_classes(folder):
        model = architectures.build(folder, cls)
        if (reason := refusal(model)) is not None:
            return reason
        with apply_densemixer(model) as handle:
            declared = (router_of(layer.router, layer.block) for layer in handle.layers)
            routers += [router for router in declared if router is not None]
    return routers
