"""What has DenseMixer attached: the layers of a model, and the handle that they belong to."""

from __future__ import annotations

import uuid
import weakref
from typing import Any

from torch import Tensor, nn

from densemixer_adapters.handle import Handle
from densemixer_adapters.transformers.announce import (
    CHANGED_EXPERTS,
    LATECOMER,
    LOST_GRADIENT,
    OVERFLOW,
    UNREAD_METRICS,
    warn,
)
from densemixer_adapters.transformers.frozen_routers import FrozenRouters
from densemixer_adapters.transformers.latecomers import Latecomers
from densemixer_adapters.transformers.layer import DenseMixerLayer

_FIX = (
    'With PEFT, add the router to modules_to_save, e.g. LoraConfig(..., modules_to_save=["{router}"]); otherwise call '
    "requires_grad_(True) on it."
)


def attached_layers(model: nn.Module) -> list[DenseMixerLayer]:
    """The layers of a model that DenseMixer is attached to, in the model's order; of copied blocks too."""
    found = []
    for module in model.modules():
        for owner in _owners_of_hooks(module):
            if isinstance(owner, DenseMixerLayer | Latecomers):
                owner.belong_to(module)
            if isinstance(owner, DenseMixerLayer):
                found.append(owner)
    return found


def attached_layer(block: nn.Module) -> DenseMixerLayer | None:
    """What is attached to a block."""
    return next((owner for owner in _owners_of_hooks(block) if isinstance(owner, DenseMixerLayer)), None)


def _owners_of_hooks(module: nn.Module) -> list[object]:
    return [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]


def _is_attached(block: nn.Module) -> bool:
    return attached_layer(block) is not None


def attached_handle(model: nn.Module) -> DenseMixerHandle | None:
    """What `apply_densemixer` returned for a model, while it is attached."""
    return next((handle_of(layer) for layer in attached_layers(model)), None)


def handle_of(layer: DenseMixerLayer) -> DenseMixerHandle | None:
    """The handle that a layer belongs to, while it is attached."""
    return layer.handle if isinstance(layer.handle, DenseMixerHandle) else None


class DenseMixerHandle(Handle[DenseMixerLayer]):
    """What `apply_densemixer` attached. Leaving it as a context manager, or `remove`, detaches it.

    A copied model takes DenseMixer along, with layers and a handle of its own, which gives way.

    Attributes:
        layers: The layers, in the model's order.
        gives_way: Whether attaching DenseMixer again takes this one's place rather than being an error.
        frozen_routers: What warns of them.
    """

    def __init__(self, model: nn.Module, layers: list[DenseMixerLayer]) -> None:
        super().__init__(layers)
        self.gives_way = False
        self.frozen_routers = FrozenRouters(layers, _FIX)
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._origin = uuid.uuid4().hex  # the same in copies
        self._said: set[str] = set()
        self._frozen_once: set[str] = set()
        for layer in layers:
            layer.attach(self)
        self._latecomers: Latecomers | None = Latecomers(model, _is_attached, self._look_for_latecomers)
        self._until_look = 0

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, of which nothing was said yet. Nobody holds that handle, so it gives way."""
        return {**vars(self), "_model": None, "_said": set(), "_frozen_once": set(), "gives_way": True}

    def warn_of_frozen_router(self, layer: DenseMixerLayer) -> None:
        """Log one warning for all layers whose router is frozen now, this one among them, but once for each.

        Layers of a copy learn their blocks one by one in its first forward. Until then, one alone waits for its next.
        """
        if layer.router_name in self._frozen_once or all(other.knows_block for other in self.layers):
            self.frozen_routers.warn_of(layer)
        self._frozen_once.add(layer.router_name)

    def warn_of_lost_gradient(self, router_name: str) -> None:
        """Log one warning of a router that isn't frozen, and whose output nevertheless has no gradient."""
        self._warn_once(LOST_GRADIENT, router_name)

    def warn_of_unread_metrics(self) -> None:
        """Log one warning that nobody reads the metrics that the options ask for."""
        self._warn_once(UNREAD_METRICS)

    def warn_of_overflow(self, name: str, count: Tensor) -> None:
        """Log one warning, if any of a float16 backward's inner products has overflowed.

        Args:
            name: The layer.
            count: How many have, a scalar tensor. Waits for the device until there has been a warning.
        """
        if OVERFLOW not in self._said and count.item():
            self._warn_once(OVERFLOW, name)

    def warn_of_changed_experts(self, name: str) -> None:
        """Log one warning that a layer's experts were written to between its forward and its backward."""
        self._warn_once(CHANGED_EXPERTS, name)

    def warn_of_latecomers(self) -> None:
        """Log one warning of a layer that has come into the model since. Looks in one of so many calls as layers."""
        if self._until_look:
            self._until_look -= 1
            return
        self._look_for_latecomers()

    def _look_for_latecomers(self) -> None:
        self._until_look = len(self.layers) - 1
        name = None if self._latecomers is None else self._latecomers.first()
        if name is not None:
            self._warn_once(LATECOMER, name)

    def _warn_once(self, text: str, name: str = "") -> None:
        if text not in self._said:
            self._said.add(text)
            warn(text.format(name=name))

    def remove(self) -> None:
        """Leave the model as it was, blocks that have been copied within it included. Does nothing the second time."""
        super().remove()
        if self._latecomers is not None:
            self._latecomers.remove()
            self._latecomers = None
        model = None if self._model is None else self._model()
        for layer in [] if model is None else attached_layers(model):
            handle = handle_of(layer)
            if handle is not None and handle._origin == self._origin:
                layer.remove()
