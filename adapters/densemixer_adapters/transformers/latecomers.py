"""Mixture-of-Experts layers that come into a model after DenseMixer has been attached to it, and train without it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

from densemixer_adapters.transformers.find import find_blocks


class Latecomers:
    """Such a layer has no hook of ours that could tell. So the others look for it now and then; and where one has gone
    out of the model and out of memory, another may have come in its place.

    Args:
        model: The model as DenseMixer is attached to it. Its life isn't prolonged.
        is_attached: Whether DenseMixer is attached to a Mixture-of-Experts layer, as it is to a copied one.
        look: Called where a layer has gone.
    """

    def __init__(self, model: nn.Module, is_attached: Callable[[nn.Module], bool], look: Callable[[], None]) -> None:
        self._model = weakref.ref(model)
        self._is_attached = is_attached
        # Some of them may be left to conventional training.
        self._known = {weakref.ref(block, lambda gone: look()) for _, block, _ in find_blocks(model)}

    def first(self) -> str | None:
        """The name and class of the first; None if there are none, or the model is gone."""
        model = self._model()
        for name, block, _ in () if model is None else find_blocks(model):
            if weakref.ref(block) not in self._known and not self._is_attached(block):
                return f"{name} ({type(block).__name__})"
        return None
