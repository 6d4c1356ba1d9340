"""DenseMixer on a live model of transformers 5.

All its Mixture-of-Experts layers share one contract: a block owns a router (``gate`` or ``router``) and ``experts``
with stacked weights, and calls ``experts(hidden_states, top_k_index, top_k_weights)``. Forward hooks on these modules
see all that the method needs, whatever kernel computes the experts, so no forward is copied or replaced.
"""

from __future__ import annotations

import sys
import uuid
import weakref
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.handle import Handle
from densemixer_adapters.switch import given_options
from densemixer_adapters.transformers.announce import (
    CHANGED_EXPERTS,
    LATECOMER,
    LOST_GRADIENT,
    OVERFLOW,
    UNREAD_METRICS,
    announce,
    describe,
    warn,
)
from densemixer_adapters.transformers.find import ROUTER_NAMES, find_blocks, find_layers
from densemixer_adapters.transformers.frozen_routers import FrozenRouters
from densemixer_adapters.transformers.latecomers import Latecomers
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_core import DenseMixerConfig

OLDEST = "5.5.4"
"""Of transformers, that the adapter works with."""


OTHERS = {
    ("megatron", "MoELayer"): "megatron",
    ("nemo_automodel", "MoE"): "automodel",
    ("torchtitan", "MoE"): "torchtitan",
}
"""Package and class of Mixture-of-Experts layers that another wing of this package is for."""

_FIX = (
    'With PEFT, add the router to modules_to_save, e.g. LoraConfig(..., modules_to_save=["{router}"]); otherwise call '
    "requires_grad_(True) on it."
)


def apply_densemixer(model: nn.Module, config: DenseMixerConfig | None = None) -> DenseMixerHandle:
    """Train the routers of a transformers model through all of their experts.

    The model's outputs stay what they are, bit for bit; nothing is added to its parameters, modules or checkpoints.
    Call it on the model that will be trained, before it is wrapped by DDP, FSDP, DeepSpeed or ``torch.compile``; before
    or after PEFT; and after transformers has spread it over ranks (``distributed_config``).

    Args:
        model: A model with Mixture-of-Experts layers, or any module that contains some.
        config: The options.

    Returns:
        A handle that lists the layers and undoes everything, also as a context manager.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts layers, one with an unknown router, or one whose
            experts don't follow the contract of transformers 5, or are spread over ranks in a way that has no
            backward or that an old version doesn't tell; or Unsloth has been imported.
        TypeError: The model or the options are of another type.
        ValueError: The options select layers that the model doesn't have.
        RuntimeError: DenseMixer is attached already.
    """
    handle = attach(model, config)
    try:
        announce(describe(model, handle.layers))
        handle.frozen_routers.warn()
    except BaseException:  # of the program's own logging
        handle.remove()
        raise
    return handle


def attach(model: nn.Module, config: DenseMixerConfig | None = None) -> DenseMixerHandle:
    """`apply_densemixer` for adapters that tell the user in the words of their framework: nothing is logged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_densemixer: the model must be a torch.nn.Module, got {type(model).__name__}")
    config = given_options(config)
    if "unsloth" in sys.modules:
        # Importing it puts its own forwards into the classes of experts, blocks and PEFT's wrappers. With LoRA on the
        # experts, the weights that DenseMixer would compute with are never made.
        raise UnsupportedModelError(
            f"{type(model).__name__}: Unsloth has been imported in this process, and replaces the forwards of "
            "Mixture-of-Experts layers and of LoRA by its own, which DenseMixer can't follow. Train without `import "
            "unsloth`, or switch DenseMixer off."
        )
    _refuse_old_versions(model)
    _refuse_layers_of_others(model)
    layers = list(find_layers(model, config))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Mixture-of-Experts layers: no module owns both `experts` and one of "
            f"{', '.join(f'`{name}`' for name in ROUTER_NAMES)}. DenseMixer trains the routers of such layers; "
            "switch it off for this model."
        )
    _make_way(model, layers)
    return DenseMixerHandle(model, layers)


def _refuse_old_versions(model: nn.Module) -> None:
    """Before 5.5.4, blocks and routers were others."""
    version = getattr(sys.modules.get("transformers"), "__version__", OLDEST)
    if Version(version) < Version(OLDEST):
        raise UnsupportedModelError(
            f"{type(model).__name__}: DenseMixer works with transformers {OLDEST} and newer, and this is {version}. "
            f'pip install "transformers>={OLDEST}", or switch DenseMixer off.'
        )


def _refuse_layers_of_others(model: nn.Module) -> None:
    """Of a framework that has a function of its own, where ours would name another reason."""
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            wing = OTHERS.get((kind.__module__.partition(".")[0], kind.__name__))
            if wing is not None:
                raise UnsupportedModelError(
                    f"{name or 'the model'} ({type(module).__name__}): this apply_densemixer is for layers of "
                    f"transformers. Take that of densemixer_adapters.{wing}."
                )


def has_experts(model: nn.Module) -> bool:
    """Whether a model has Mixture-of-Experts layers, be they of a kind that DenseMixer can train or not."""
    return next(find_blocks(model), None) is not None


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


def _attached_layer(block: nn.Module) -> DenseMixerLayer | None:
    return next((owner for owner in _owners_of_hooks(block) if isinstance(owner, DenseMixerLayer)), None)


def _owners_of_hooks(module: nn.Module) -> list[object]:
    return [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]


def _is_attached(block: nn.Module) -> bool:
    return _attached_layer(block) is not None


def _make_way(model: nn.Module, layers: list[DenseMixerLayer]) -> None:
    """Remove handles that give way, where they have the blocks of these layers.

    Raises:
        RuntimeError: One of the blocks belongs to a handle that doesn't.
    """
    attached_layers(model)  # so that layers of copies know their blocks
    handles = []
    for layer in layers:
        attached = _attached_layer(layer.block)
        handle = None if attached is None else _handle_of(attached)
        if handle is None:
            continue
        if not handle.gives_way:
            raise RuntimeError(
                f"{layer.name} ({type(layer.block).__name__}): DenseMixer is attached already; call .remove() on its "
                "handle first."
            )
        handles.append(handle)
    for handle in handles:
        handle.remove()


def attached_handle(model: nn.Module) -> DenseMixerHandle | None:
    """What `apply_densemixer` returned for a model, while it is attached."""
    return next((_handle_of(layer) for layer in attached_layers(model)), None)


def _handle_of(layer: DenseMixerLayer) -> DenseMixerHandle | None:
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
            handle = _handle_of(layer)
            if handle is not None and handle._origin == self._origin:
                layer.remove()
