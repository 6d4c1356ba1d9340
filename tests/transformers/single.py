"""One layer of a tiny model by itself, with the input and the output's gradient that a test chooses, and its oracle."""

from __future__ import annotations

import copy
from typing import Any

import architectures
import oracle
import pytest
import torch
import transformers
from formulas import FORMULAS, Formula, dense
from torch import Tensor, nn

HIDDEN = 32
"""The hidden size of the models of `architectures`."""


class Single:
    """The first Mixture-of-Experts layer of an architecture.

    Attributes:
        model: The model that it is a part of.
        block: The layer, which is called with [batch, length, hidden].
        twin: A copy that DenseMixer is never attached to, of which the oracle is made. What a test does to the block
            besides its weights (hooks, options), it does to the twin as well.
        indices: The experts that the block selected, [tokens, k], one for each of its calls in this thread's order.
    """

    def __init__(self, folder: str, implementation: str = "eager", **options: Any) -> None:
        if not (architectures.MODELS / folder).exists():
            pytest.skip(f"transformers {transformers.__version__} has no {folder}")
        self.folder = folder
        self.model = architectures.build(folder, **options)
        for module in self.model.modules():
            if hasattr(getattr(module, "experts", None), "down_proj"):
                module.experts.config._experts_implementation = implementation
        self._twins = copy.deepcopy(self.model).double()
        self.block, self.twin = _first_block(self.model), _first_block(self._twins)
        self.indices: list[Tensor] = []
        self.block.experts.register_forward_pre_hook(lambda module, args: self.indices.append(args[1].detach().clone()))

    @property
    def router(self) -> Any:
        return router_of(self.block)

    def train(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """The gradients of the input and of all parameters that have one, for the gradient g of the output."""
        return gradients(self.block, x, g)

    def truth(
        self, x: Tensor, g: Tensor, estimator: str, formula: Formula | None = None, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The oracle's, in float64, with the selection of ``index`` or else the twin's own."""
        self.twin.load_state_dict(self.block.state_dict())
        layers = [(self.twin, router_of(self.twin))]
        with oracle.Float64():
            found = dense(self._twins, layers, formula or FORMULAS[self.folder], estimator)
            block = _first_block(found)
            if index is not None:
                block.experts.register_forward_pre_hook(lambda module, args: (args[0], index, *args[2:]))
            return gradients(block, x.double(), g.double())


def _first_block(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(getattr(m, "experts", None), "down_proj"))


def router_of(block: nn.Module) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


def run(block: nn.Module, x: Tensor) -> Tensor:
    output = block(x)
    return output[0] if isinstance(output, tuple) else output


def gradients(block: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Those of the input and of all parameters that have one, taken without touching any ``grad``."""
    x = x.clone().requires_grad_()
    wanted = {"input": x, **{name: p for name, p in block.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(run(block, x), list(wanted.values()), g, allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def tokens(count: int, seed: int = 0, hidden: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output, [1, count, hidden] each."""
    x, g = torch.randn(2, 1, count, hidden, generator=torch.Generator().manual_seed(seed))
    return x, g


def scored_low(layer: Single, levels: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of which each has logits about its level, for all experts; one that is 0 leaves the token as it comes."""
    x, g = tokens(len(levels), seed)
    weight = getattr(layer.router, "gate", layer.router).weight
    with torch.no_grad():
        weight[:, 0] = 30.0
    x[0, :, 0] = torch.tensor(levels) / 30
    return x, g
