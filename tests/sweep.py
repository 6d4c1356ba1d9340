"""What becomes of each architecture when DenseMixer is attached to a tiny model of it."""

from __future__ import annotations

import architectures
import pytest
import torch
from torch import Tensor, nn

from densemixer_adapters.transformers import Router, UnsupportedModelError, apply_densemixer
from densemixer_adapters.transformers.checks import OutputMismatchError
from densemixer_adapters.transformers.find import find_blocks
from densemixer_adapters.transformers.routers import ROUTERS, router_of
from densemixer_core import RoutingMismatchError
from densemixer_core.routing import SCORE_FUNCTIONS


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


CONFIGURED = "norm_topk_prob"  # the name that most models have for it


def line_to_add(folder: str) -> str:
    """What an architecture lacks whose router isn't declared: the declaration that fits its weights, if one does."""
    try:
        model = architectures.build(folder)
        step(model)
    except Exception as error:
        return f"{folder}: options that make a tiny model of it, in architectures.OPTIONS: {error}"
    for _, block, name in find_blocks(model):
        router = block.get_submodule(name) if name else block
        kind = type(block if type(router) is nn.Linear else router).__name__
        for score in SCORE_FUNCTIONS:
            for renormalised in (CONFIGURED, True, False):
                if fits(model, kind, Router(score, renormalised)):
                    said = f'"{renormalised}"' if renormalised == CONFIGURED else renormalised
                    return (
                        f'{folder}: "{kind}": Router("{score}", {said}) in routers.ROUTERS, with what is added to the '
                        "sum of the scores as epsilon, and its formula in formulas.FORMULAS"
                    )
    return f"{folder}: a line in REFUSED, or a declaration of another kind: {refusal(model)}"


def fits(model: nn.Module, name: str, router: Router) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROUTERS, name, router)
        try:
            with apply_densemixer(model):
                step(model)
        except (UnsupportedModelError, RoutingMismatchError, OutputMismatchError, AttributeError):
            return False
    return True


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
