"""DenseMixer on a live model of transformers 5.

All its Mixture-of-Experts layers share one contract: a block owns a router (``gate`` or ``router``) and ``experts``
with stacked weights, and calls ``experts(hidden_states, top_k_index, top_k_weights)``. Forward hooks on these modules
see all that the method needs, whatever kernel computes the experts, so no forward is copied or replaced.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
import weakref
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from densemixer_adapters.finding import ROUTER_NAMES, find_blocks, find_layers
from densemixer_adapters.layer import DenseMixerLayer, UnsupportedModelError
from densemixer_core import DenseMixerConfig

__all__ = [
    "DenseMixerHandle",
    "DenseMixerLayer",
    "UnsupportedModelError",
    "apply_densemixer",
    "attached_layers",
    "has_experts",
]

logger = logging.getLogger("densemixer")


def apply_densemixer(model: nn.Module, config: DenseMixerConfig | None = None) -> DenseMixerHandle:
    """Train the routers of a transformers model through all of their experts.

    The model's outputs stay what they are, bit for bit; nothing is added to its parameters, modules or checkpoints.
    Call it on the model that will be trained, before it is wrapped by DDP, FSDP, DeepSpeed or ``torch.compile``; before
    or after PEFT.

    Args:
        model: A model with Mixture-of-Experts layers, or any module that contains some.
        config: The options.

    Returns:
        A handle that lists the layers and undoes everything, also as a context manager.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts layers, one with an unknown router, or one whose
            experts don't follow the contract of transformers 5, or are split by its tensor or expert parallelism; or
            Unsloth has been imported.
        TypeError: The model or the options are of another type.
        ValueError: The options select layers that the model doesn't have.
        RuntimeError: DenseMixer is attached already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_densemixer: the model must be a torch.nn.Module, got {type(model).__name__}")
    config = DenseMixerConfig() if config is None else config
    if not isinstance(config, DenseMixerConfig):
        raise TypeError(
            f"apply_densemixer: the options must be a DenseMixerConfig, got {type(config).__name__}. Build one from a "
            "mapping by DenseMixerConfig.from_dict."
        )
    if "unsloth" in sys.modules:
        # Importing it puts its own forwards into the classes of experts, blocks and PEFT's wrappers. With LoRA on the
        # experts, the weights that DenseMixer would compute with are never made.
        raise UnsupportedModelError(
            f"{type(model).__name__}: Unsloth has been imported in this process, and replaces the forwards of "
            "Mixture-of-Experts layers and of LoRA by its own, which DenseMixer can't follow. Train without `import "
            "unsloth`, or switch DenseMixer off."
        )
    layers = list(find_layers(model, config))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Mixture-of-Experts layers: no module owns both `experts` and one of "
            f"{', '.join(f'`{name}`' for name in ROUTER_NAMES)}. DenseMixer trains the routers of such layers; "
            "switch it off for this model."
        )
    _make_way(model, layers)
    handle = DenseMixerHandle(model, layers)
    logger.log(
        logging.DEBUG if os.environ.get("RANK", "").strip("0 ").isdigit() else logging.INFO,
        "DenseMixer is attached to %d layers of %s (%s): estimator %s, %.3g GFLOP more a token in the backward",
        len(layers),
        type(model).__name__,
        getattr(getattr(model, "config", None), "model_type", "no model type"),
        config.estimator,
        1e-9 * sum(layer.extra_operations for layer in layers),
    )
    handle.warn_of_frozen_routers()
    return handle


def has_experts(model: nn.Module) -> bool:
    """Whether a model has Mixture-of-Experts layers, be they of a kind that DenseMixer can train or not."""
    return next(find_blocks(model), None) is not None


def attached_layers(model: nn.Module) -> list[DenseMixerLayer]:
    """The layers of a model that DenseMixer is attached to, in the model's order; of copied blocks too."""
    found = []
    for block in model.modules():
        layer = _attached_layer(block)
        if layer is not None:
            layer.belong_to(block)
            found.append(layer)
    return found


def _attached_layer(block: nn.Module) -> DenseMixerLayer | None:
    owners = (getattr(hook, "__self__", None) for hook in block._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, DenseMixerLayer)), None)


def _make_way(model: nn.Module, layers: list[DenseMixerLayer]) -> None:
    """Remove handles that give way, where they have the blocks of these layers.

    Raises:
        RuntimeError: One of the blocks belongs to a handle that doesn't.
    """
    attached_layers(model)  # so that layers of copies know their blocks
    handles = []
    for layer in layers:
        attached = _attached_layer(layer.block)
        if attached is None or attached.handle is None:
            continue
        if not attached.handle.gives_way:
            raise RuntimeError(
                f"{layer.name} ({type(layer.block).__name__}): DenseMixer is attached already; call .remove() on its "
                "handle first."
            )
        handles.append(attached.handle)
    for handle in handles:
        handle.remove()


class DenseMixerHandle:
    """What `apply_densemixer` attached. Leaving it as a context manager, or `remove`, detaches it.

    A copied model takes DenseMixer along, with layers and a handle of its own, which gives way.

    Attributes:
        layers: The layers, in the model's order.
        gives_way: Whether attaching DenseMixer again takes this one's place rather than being an error.
    """

    def __init__(self, model: nn.Module, layers: list[DenseMixerLayer]) -> None:
        self.layers = layers
        self.gives_way = False
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._origin = uuid.uuid4().hex  # the same in copies
        self._known_as_frozen: set[str] = set()
        self._said: set[str] = set()
        for layer in layers:
            layer.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. Nobody holds that handle, so it gives way."""
        return {**vars(self), "_model": None, "gives_way": True}

    def warn_of_frozen_routers(self) -> None:
        """Log one warning for all layers whose router is frozen now and wasn't when this was last called."""
        frozen = [layer.router_name for layer in self.layers if layer.router_is_frozen]
        new = [name for name in frozen if name not in self._known_as_frozen]
        self._known_as_frozen = set(frozen)
        if not new:
            return
        logger.warning(
            "DenseMixer has nothing to train where the router is frozen: %s%s. Such a layer trains as without "
            'DenseMixer. With PEFT, add the router to modules_to_save, e.g. LoraConfig(..., modules_to_save=["%s"]); '
            "otherwise call requires_grad_(True) on it.",
            new[0],
            f" and {len(new) - 1} more" if len(new) > 1 else "",
            ".".join(new[0].split(".")[-2:]),
        )

    def warn_of_unread_metrics(self) -> None:
        """Log one warning that nobody reads the metrics that the options ask for."""
        self._say_once(
            "DenseMixer: the option metrics does nothing in this training loop, where nobody reads router metrics. The "
            "Trainer of transformers logs them if it has densemixer_adapters.callback.DenseMixerCallback() among its "
            "callbacks, or under DENSEMIXER_ENABLED=1; and so do LLaMA-Factory and verl with the option set there. "
            "Otherwise leave it out."
        )

    def warn_of_overflow(self, count: Tensor) -> None:
        """Log one warning, if any of a float16 backward's inner products has overflowed.

        Args:
            count: How many have, a scalar tensor. Waits for the device until there has been a warning.
        """
        if self._OVERFLOW not in self._said and count.item():
            self._say_once(self._OVERFLOW)

    def warn_of_changed_experts(self, name: str) -> None:
        """Log one warning for all layers."""
        if not any("written to in place" in said for said in self._said):
            self._say_once(
                f"DenseMixer: the weights of the experts of {name} were written to in place between its forward and "
                "its backward. The gradient that DenseMixer adds is that of the weights as they are in the backward."
            )

    _OVERFLOW = (
        "DenseMixer: for some tokens the output of an expert that wasn't selected doesn't fit into float16. Such a "
        "pair of a token and an expert counts as nothing, as in conventional training. Router metrics count them as "
        "pairs_left_out. bfloat16 has no such limit."
    )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)

    def remove(self) -> None:
        """Leave the model as it was, blocks that have been copied within it included. Does nothing the second time."""
        for layer in self.layers:
            layer.remove()
        model = None if self._model is None else self._model()
        for layer in [] if model is None else attached_layers(model):
            if layer.handle is not None and layer.handle._origin == self._origin:
                layer.remove()

    def __enter__(self) -> DenseMixerHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
