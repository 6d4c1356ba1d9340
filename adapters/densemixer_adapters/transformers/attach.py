"""DenseMixer on a live model of transformers 5.

All its Mixture-of-Experts layers share one contract: a block owns a router (``gate`` or ``router``) and ``experts``
with stacked weights, and calls ``experts(hidden_states, top_k_index, top_k_weights)``. Forward hooks on these modules
see all that the method needs, whatever kernel computes the experts, so no forward is copied or replaced.
"""

from __future__ import annotations

import sys

from packaging.version import Version
from torch import nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.switch import given_options
from densemixer_adapters.transformers.announce import announce, describe
from densemixer_adapters.transformers.attached import DenseMixerHandle, attached_layer, attached_layers, handle_of
from densemixer_adapters.transformers.find import ROUTER_NAMES, find_blocks, find_layers
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


def _make_way(model: nn.Module, layers: list[DenseMixerLayer]) -> None:
    """Remove handles that give way, where they have the blocks of these layers.

    Raises:
        RuntimeError: One of the blocks belongs to a handle that doesn't.
    """
    attached_layers(model)  # so that layers of copies know their blocks
    handles = []
    for layer in layers:
        attached = attached_layer(layer.block)
        handle = None if attached is None else handle_of(attached)
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
