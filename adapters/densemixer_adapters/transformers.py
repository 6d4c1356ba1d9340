"""DenseMixer on a live model of transformers 5.

All its Mixture-of-Experts layers share one contract: a block owns a router (``gate`` or ``router``) and ``experts``
with stacked weights, and calls ``experts(hidden_states, top_k_index, top_k_weights)``. Forward hooks on these modules
see all that the method needs, whatever kernel computes the experts, so no forward is copied or replaced.
"""

from __future__ import annotations

import sys
from types import TracebackType

from torch import nn

from densemixer_adapters.announce import UNREAD_METRICS, FrozenRouters, announce, describe, warn
from densemixer_adapters.finding import ROUTER_NAMES, find_blocks, find_layers
from densemixer_adapters.layer import DenseMixerLayer, UnsupportedModelError
from densemixer_core import DenseMixerConfig

__all__ = [
    "DenseMixerHandle",
    "DenseMixerLayer",
    "UnsupportedModelError",
    "apply_densemixer",
    "attach",
    "attached_handle",
    "attached_layers",
    "has_experts",
]


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
    handle = attach(model, config)
    announce(describe(model, handle.layers))
    handle.warn_of_frozen_routers()
    return handle


def attach(model: nn.Module, config: DenseMixerConfig | None = None) -> DenseMixerHandle:
    """`apply_densemixer` for adapters that tell the user in the words of their framework: nothing is logged."""
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
    return DenseMixerHandle(layers)


def has_experts(model: nn.Module) -> bool:
    """Whether a model has Mixture-of-Experts layers, be they of a kind that DenseMixer can train or not."""
    return next(find_blocks(model), None) is not None


def attached_layers(model: nn.Module) -> list[DenseMixerLayer]:
    """The layers of a model that DenseMixer is attached to, in the model's order."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, DenseMixerLayer)))


def attached_handle(model: nn.Module) -> DenseMixerHandle | None:
    """What `apply_densemixer` returned for a model, while it is attached."""
    return next((layer._handle for layer in attached_layers(model)), None)


class DenseMixerHandle:
    """What `apply_densemixer` attached. Leaving it as a context manager, or `remove`, detaches it.

    Attributes:
        layers: The layers, in the model's order.
        gives_way: Whether attaching DenseMixer again takes this one's place rather than being an error.
        frozen_routers: What warns of them.
    """

    def __init__(self, layers: list[DenseMixerLayer]) -> None:
        self.layers = layers
        self.gives_way = False
        self.frozen_routers = FrozenRouters(layers)
        self._warned_of_metrics = False
        for layer in layers:
            layer.attach(self)

    def warn_of_frozen_routers(self) -> None:
        """Log one warning for all layers whose router is frozen now, but once for each."""
        self.frozen_routers.warn()

    def warn_of_unread_metrics(self) -> None:
        """Log one warning that nobody reads the metrics that the options ask for."""
        if not self._warned_of_metrics:
            self._warned_of_metrics = True
            warn(UNREAD_METRICS)

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
