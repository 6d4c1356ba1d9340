"""What the tests do with a model: run it, collect gradients, selections and dispatched operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from families import Family, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def selections(family: Family, model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the indices that the layers hand to their experts, in the order of the calls."""
    indices: list[Tensor] = []
    hooks = [
        experts.register_forward_pre_hook(lambda module, args: indices.append(args[1].detach().clone()))
        for experts in dict.fromkeys(block.experts for block in family.blocks(model))  # some may be shared
    ]
    try:
        yield indices
    finally:
        for hook in hooks:
            hook.remove()


def loss_of(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    ids = tokens() if ids is None else ids
    return model(input_ids=ids, labels=ids).loss


def gradients(model: nn.Module, ids: Tensor | None = None) -> dict[str, Tensor]:
    """The gradient of every parameter after one step from zero; also of the embedded input, as ``input``."""
    model.zero_grad()
    ids = tokens() if ids is None else ids
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"input": embedded.grad, **found}


class Operations(TorchDispatchMode):
    """The names of the operations that reach the dispatcher, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
