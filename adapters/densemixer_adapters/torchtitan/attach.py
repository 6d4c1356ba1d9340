"""DenseMixer on a model of torchtitan, or on the parts of it that a rank of a pipeline has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.handle import Handle
from densemixer_adapters.switch import given_options
from densemixer_adapters.torchtitan.layer import TorchtitanLayer, attached_layer
from densemixer_adapters.torchtitan.refuse import refuse_compiled, refuse_layer
from densemixer_adapters.transformers.announce import announce
from densemixer_adapters.transformers.frozen_routers import FrozenRouters
from densemixer_core import DenseMixerConfig

_FIX = "Call requires_grad_(True) on its router after whatever froze it, e.g. a LoRA converter."


def apply_densemixer(
    model: nn.Module | Sequence[nn.Module], config: DenseMixerConfig | None = None
) -> TorchtitanHandle:
    """Train the routers of a torchtitan model through all of their experts.

    The model's outputs stay what they are, bit for bit; nothing is added to its parameters, modules or checkpoints.
    Call it on every rank, before or after ``parallelize_fn``.

    Args:
        model: A model, or a trainer's ``model_parts``.
        config: The options.

    Returns:
        A handle that lists the layers and undoes everything, also as a context manager.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts layers, one that is built of what DenseMixer doesn't
            know, or one that is compiled.
        TypeError: The options are of another type.
        ValueError: The options select layers that the model doesn't have, or ask for metrics.
        RuntimeError: DenseMixer is attached already.
    """
    options = given_options(config)
    if options.metrics:
        raise ValueError(
            "metrics: router metrics don't get into torchtitan's log. Leave the option out; the gradients are the same."
        )
    parts = _parts(model)
    found = _moe_layers(parts)
    names = _names(parts, [name for name, _ in found])
    if not names:
        raise UnsupportedModelError(
            f"{type(parts[0]).__name__} has no layer of torchtitan's class MoE. DenseMixer trains the routers of such "
            "layers; switch it off for this model."
        )
    refuse_compiled(parts)
    for name, moe in found:
        refuse_layer(name, moe)
        if attached_layer(moe) is not None:
            raise RuntimeError(
                f"{name}: DenseMixer is attached already, by apply_densemixer or by an override; "
                "attached_handle(model).remove() detaches it."
            )
    selected = {names[position] for position in options.positions(len(names))}
    layers = [TorchtitanLayer(name, moe, options) for name, moe in found if name in selected]
    frozen_routers = FrozenRouters(layers, _FIX)
    for layer in layers:
        layer.attach(frozen_routers)
    announce(
        f"DenseMixer is attached to {len(layers)} layers of this rank's part of {type(parts[0]).__name__}: estimator "
        f"{options.estimator}, budget {options.budget:g}"
    )
    frozen_routers.warn()
    return TorchtitanHandle(layers)


def attached_handle(model: nn.Module | Sequence[nn.Module]) -> TorchtitanHandle:
    """What is attached to a model, or to a trainer's ``model_parts``, whoever did it. Its ``layers`` may be none."""
    layers = (attached_layer(moe) for _, moe in _moe_layers(_parts(model)))
    return TorchtitanHandle([layer for layer in layers if layer is not None])


class TorchtitanHandle(Handle[TorchtitanLayer]):
    """What is attached to a model: the layers of this rank."""


def _parts(model: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    return [model] if isinstance(model, nn.Module) else model


def _moe_layers(parts: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    """Name and module. The names are those of checkpoints, without what activation checkpointing puts between."""
    from torchtitan.models.common.moe import MoE

    return [
        (name.replace("_checkpoint_wrapped_module.", ""), module)
        for part in parts
        for name, module in part.named_modules()
        if isinstance(module, MoE)
    ]


def _names(parts: Sequence[nn.Module], found: list[str]) -> list[str]:
    """Those of the whole model's layers, in its order: a stage of a pipeline has some of them, or none."""
    blocks = getattr(getattr(parts[0], "config", None), "layers", None)
    if blocks is None:
        return found
    names = [f"layers.{n}.moe" for n, block in enumerate(blocks) if getattr(block, "moe", None) is not None]
    return names if set(found) <= set(names) else found
