"""Shared experts that Megatron Core overlaps with the routed ones, and adds where it combines the output of these."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def shared_experts_apart(dispatcher: Any) -> Iterator[list[Tensor]]:
    """Have the dispatcher add nothing where it adds the output of overlapped shared experts, which is listed instead.

    What is added is −0, which leaves every bit of the routed experts' output, +0 and −0 included, as it is.
    """
    apart: list[Tensor] = []
    experts = getattr(dispatcher, "shared_experts", None)
    if experts is None:
        yield apart
        return

    def get_output() -> Tensor:
        apart.append(type(experts).get_output(experts))
        return torch.tensor(-0.0, dtype=apart[0].dtype, device=apart[0].device)

    experts.get_output = get_output
    try:
        yield apart
    finally:
        del experts.get_output
