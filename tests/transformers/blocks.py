"""Single layers: their gradients, and those that the dense oracle has for them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from families import FAMILIES, Family
from torch import Tensor, nn

KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]
"""Families that differ in how scores become weights, in what an expert is and in what a block returns."""

ESTIMATORS = ["densemixer", "centered"]


def block_of(family: str, implementation: str = "grouped_mm", seed: int = 0) -> nn.Module:
    of = FAMILIES[family]
    return of.blocks(of.build(implementation, seed))[0]


def data(seed: int = 0, batch: int = 2, length: int = 8) -> tuple[Tensor, Tensor]:
    """A layer's input and the gradient of its output, [batch, length, hidden] each."""
    x, g = torch.randn(2, batch, length, 64, generator=torch.Generator().manual_seed(seed))
    return x, g


def tensor_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a block returns may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def collected(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of a module's parameters, without the names of wrappers for checkpointing."""
    parameters = module.named_parameters()
    found = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    return {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}


def block_gradients(block: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    tensor_of(block(x)).backward(g)
    return {"input": x.grad, **collected(block)}


def selected(block: nn.Module, x: Tensor) -> Tensor:
    """The experts that a block to which DenseMixer isn't attached selects, [tokens, k]."""
    indices: list[Tensor] = []
    hook = block.experts.register_forward_pre_hook(lambda module, args: indices.append(args[1]))
    with torch.no_grad():
        block(x)
    hook.remove()
    return indices[0]


def block_truth(
    family: Family,
    block: nn.Module,
    x: Tensor,
    g: Tensor,
    estimator: str,
    after: Callable[[Tensor], Tensor] = lambda y: y,
) -> dict[str, Tensor]:
    """The oracle's gradients. Call it while nothing is attached to the block or hooked on it."""
    dense = copy.deepcopy(block)
    dense.forward = family.oracle_forward(selected(block, x), estimator, after).__get__(dense)
    return block_gradients(dense.double(), x.double(), g.double())


def replica(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a module for one of its devices in each step (its own function needs several)."""
    replicated = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replicated, name, replica(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            replicated._parameters[name] = None
        else:
            setattr(replicated, name, parameter.view_as(parameter))
    return replicated
