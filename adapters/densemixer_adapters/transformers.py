"""DenseMixer on a live model of transformers 5.

All its Mixture-of-Experts layers share one contract: a block owns a router (``gate`` or ``router``) and ``experts``
with stacked weights, and calls ``experts(hidden_states, top_k_index, top_k_weights)``. Forward hooks on these modules
see all that the method needs, whatever kernel computes the experts, so no forward is copied or replaced.
"""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType

from torch import nn

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
        ValueError: The options select layers that the model doesn't have.
        RuntimeError: DenseMixer is attached already.
    """
    config = config or DenseMixerConfig()
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
    handle = DenseMixerHandle(layers)
    logger.log(
        logging.DEBUG if int(os.environ.get("RANK") or 0) else logging.INFO,
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
    """The layers of a model that DenseMixer is attached to, in the model's order."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, DenseMixerLayer)))


class DenseMixerHandle:
    """What `apply_densemixer` attached. Leaving it as a context manager, or `remove`, detaches it.

    Attributes:
        layers: The layers, in the model's order.
        gives_way: Whether attaching DenseMixer again takes this one's place rather than being an error.
    """

    def __init__(self, layers: list[DenseMixerLayer]) -> None:
        self.layers = layers
        self.gives_way = False
        self._known_as_frozen: set[str] = set()
        self._warned_of_metrics = False
        for layer in layers:
            layer.attach(self)

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
        if not self._warned_of_metrics:
            self._warned_of_metrics = True
            logger.warning(
                "DenseMixer: the option metrics does nothing in this training loop, where nobody reads router metrics. "
                "The Trainer of transformers logs them if it has densemixer_adapters.callback.DenseMixerCallback() "
                "among its callbacks, or under DENSEMIXER_ENABLED=1; and so do LLaMA-Factory and verl with the option "
                "set there. Otherwise leave it out."
            )

    def remove(self) -> None:
        """Leave the model as it was. Does nothing the second time."""
        for layer in self.layers:
            layer.remove()

    def __enter__(self) -> DenseMixerHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
