"""Attaching DenseMixer to a model that Automodel has built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from densemixer_adapters import transformers
from densemixer_adapters.automodel.experts import activation
from densemixer_adapters.automodel.layer import AutomodelLayer
from densemixer_adapters.automodel.refuse import refuse_block, refuse_model
from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.handle import Handle
from densemixer_adapters.switch import given_options
from densemixer_adapters.transformers.announce import UNREAD_METRICS, announce, warn
from densemixer_adapters.transformers.frozen_routers import FrozenRouters
from densemixer_core import DenseMixerConfig

_FIX = "LoRA freezes routers, and so may freeze_config; leave `gate` out of what is frozen."


def apply_densemixer(
    model: nn.Module, config: DenseMixerConfig | None = None
) -> AutomodelHandle | transformers.DenseMixerHandle:
    """Train the routers of a model that Automodel has built through all of their experts.

    The model's outputs stay what they are, bit for bit; nothing is added to its parameters, modules or checkpoints.
    Call it on every rank, on what ``from_pretrained`` or ``from_config`` returned.

    Args:
        model: A model with Automodel's own Mixture-of-Experts layers, or with those of transformers (``force_hf``).
        config: The options.

    Returns:
        A handle that lists the layers and undoes everything, also as a context manager.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts layers, or something that can't be trained this way.
        TypeError: The options are of another type.
        ValueError: The options select layers that the model doesn't have.
        RuntimeError: DenseMixer is attached already.
    """
    config = given_options(config)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"DenseMixer can't train this {type(model).__name__}: pipeline parallelism has not been run with the "
            "layers of Automodel. Set pp_size to 1, or switch DenseMixer off."
        )
    blocks = list(find_blocks(model))
    if not blocks:
        return transformers.apply_densemixer(model, config)
    refuse_model(model)
    chosen = [blocks[position] for position in config.positions(len(blocks))]
    for name, block in chosen:
        if attached_layer(block) is not None:
            raise RuntimeError(f"{name}: DenseMixer is attached already; call .remove() on its handle first.")
        refuse_block(name, block)
    handle = AutomodelHandle(chosen, config)
    announce(f"DenseMixer is attached to {len(chosen)} of {len(blocks)} layers of {type(model).__name__}: {config}")
    if config.metrics:
        warn(UNREAD_METRICS)
    handle.frozen_routers.warn()
    return handle


def find_blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each of Automodel's own Mixture-of-Experts layers."""
    from nemo_automodel.components.moe.layers import MoE

    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield name, module


def attached_layer(block: nn.Module) -> AutomodelLayer | None:
    """The layer that is attached to a block now."""
    owners = (getattr(hook, "__self__", None) for hook in block._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, AutomodelLayer)), None)


class AutomodelHandle(Handle[AutomodelLayer]):
    """What `apply_densemixer` attached.

    Attributes:
        layers: The layers, in the model's order.
        frozen_routers: What warns of them.
    """

    def __init__(self, blocks: list[tuple[str, Any]], config: DenseMixerConfig) -> None:
        layers = []
        for name, block in blocks:
            formula = activation(block.experts.config)
            assert formula is not None  # or it would have been refused
            layers.append(AutomodelLayer(name, block, config, formula))
        super().__init__(layers)
        self.frozen_routers = FrozenRouters(layers, _FIX)
        for layer in layers:
            layer.attach(self.frozen_routers)
