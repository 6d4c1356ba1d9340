"""Mixture-of-Experts layers that come into a model after DenseMixer has been attached to it, and train without it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from densemixer_adapters.transformers import calls
from densemixer_adapters.transformers.checks import Recurring
from densemixer_adapters.transformers.find import find_blocks


class Latecomers:
    """Such a layer has no hook of ours that could tell. So the model has it looked for now and then, and so have the
    other layers: not all who wrap a model call it as a module. And where a layer has gone out of the model and out of
    memory, another may have come in its place.

    Args:
        model: The model as DenseMixer is attached to it. Its life isn't prolonged.
        is_attached: Whether DenseMixer is attached to a Mixture-of-Experts layer, as it is to a copied one.
        look: Called where there may be one.
    """

    def __init__(self, model: nn.Module, is_attached: Callable[[nn.Module], bool], look: Callable[[], None]) -> None:
        self._is_attached = is_attached
        self._look = look
        self._recurring = Recurring()
        self._model: weakref.ref[nn.Module] | None = None
        self._known: set[weakref.ref[nn.Module]] = set()
        self.belong_to(model)
        model.register_forward_pre_hook(self._before_model)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose model is another."""
        return {**vars(self), "_model": None, "_known": set()}

    def belong_to(self, model: nn.Module) -> None:
        """Say whose these are, and that what it has now is known, where that isn't said yet, as for a copy."""
        if self._model is None:
            self._model = weakref.ref(model)
            # Some of them may be left to conventional training.
            self._known = {weakref.ref(block, lambda gone: self._look()) for _, block, _ in find_blocks(model)}

    def _before_model(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        self.belong_to(model)
        if torch.is_grad_enabled() and self._recurring.due():
            self._recurring.made()
            self._look()

    def first(self) -> str | None:
        """The name and class of the first; None if there are none, or the model is gone."""
        model = self._model_or_none
        for name, block, _ in () if model is None else find_blocks(model):
            if weakref.ref(block) not in self._known and not self._is_attached(block):
                return f"{name} ({type(block).__name__})"
        return None

    def remove(self) -> None:
        """Look no longer."""
        model = self._model_or_none
        if model is not None:
            calls.remove_hooks_of(self, model)
        self._known = set()

    @property
    def _model_or_none(self) -> nn.Module | None:
        return None if self._model is None else self._model()
