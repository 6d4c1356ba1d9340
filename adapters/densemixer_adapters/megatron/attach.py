"""Attaching DenseMixer to a built model of Megatron Core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.handle import Handle
from densemixer_adapters.megatron.announce import announce
from densemixer_adapters.megatron.config_field import FLAG, read_flag
from densemixer_adapters.megatron.layer import MegatronLayer, attached_layer
from densemixer_adapters.megatron.metrics import measure, want_metrics
from densemixer_adapters.megatron.positions import PATTERNS, Selection, has_experts
from densemixer_adapters.megatron.refuse import refuse_config
from densemixer_adapters.switch import given_options
from densemixer_core import DenseMixerConfig


def apply_densemixer(model: nn.Module | Sequence[nn.Module], config: DenseMixerConfig | None = None) -> MegatronHandle:
    """Train the routers of a Megatron Core model through all of their experts.

    The model's outputs stay what they are, bit for bit; nothing is added to its parameters, modules or checkpoints.
    Call it on the built model, on every rank; best before DDP wraps it, as a pre-wrap hook of Megatron-Bridge does:
    ``provider.register_pre_wrap_hook(lambda model: apply_densemixer(model) and model)``.

    Args:
        model: The model, or its chunks of this pipeline stage.
        config: The options.

    Returns:
        A handle that lists the layers and undoes everything, also as a context manager.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts layers at all, or one that can't be trained this way.
        TypeError: The options are of another type.
        ValueError: The options select layers that the model doesn't have, or its layers aren't known.
        RuntimeError: DenseMixer is attached already.
    """
    options = given_options(config)
    chunks = _chunks(model)
    paths = _moe_layers(chunks)
    settings = _configuration(chunks)
    if not has_experts(settings):
        raise UnsupportedModelError(
            f"{type(chunks[0]).__name__} has no MoELayer, and its configuration no num_moe_experts. DenseMixer trains "
            "the routers of such layers; switch it off for this model."
        )
    # What follows from the configuration comes first: ranks whose stage has no such layer must raise as all others do.
    refuse_config(settings, options)
    selection = Selection(settings, options, _pattern(chunks))
    layers = [MegatronLayer(block, options, selection, path) for path, block in paths]
    for layer in layers:
        if attached_layer(layer.router) is not None:
            raise RuntimeError(
                f"{layer.name}: DenseMixer is attached already, by apply_densemixer or {FLAG}; "
                "attached_handle(model).remove() detaches it."
            )
        layer.check_block()
    selection.compare(_layer_numbers(chunks), [layer.block.layer_number for layer in layers])
    layers = [layer for layer in layers if layer.is_selected()]
    for layer in layers:
        layer.attach()
    if options.metrics:
        want_metrics()
    announce(chunks[0], layers, options.estimator)
    return MegatronHandle(layers)


def attached_handle(model: nn.Module | Sequence[nn.Module]) -> MegatronHandle:
    """What is attached to a model, by `apply_densemixer` or by its configuration.

    Never None: a rank may hold none of the layers, and takes part in what all ranks do together.
    """
    layers = (attached_layer(block.router) for _, block in _moe_layers(_chunks(model)))
    return MegatronHandle([layer for layer in layers if layer is not None])


def wants_metrics(model: nn.Module | Sequence[nn.Module]) -> bool:
    """Whether a model's configuration asks for router metrics: the same on every rank."""
    options = read_flag(_configuration(_chunks(model)))
    return options is not None and options.metrics


class MegatronHandle(Handle[MegatronLayer]):
    """What is attached to a model. Leaving it as a context manager, or `remove`, detaches it.

    Attributes:
        layers: The layers of this rank, in the model's order.
    """

    def metrics(self) -> dict[str, float]:
        """Router metrics of the last step: ``densemixer/NAME``, ``densemixer/layer_N/NAME`` with layers from 0.

        For training loops that Megatron Core doesn't log for. Collective: all ranks of the model call it after each
        step, also those that hold none of its layers; all get the same. Nothing without the option ``metrics``.
        """
        return measure(self.layers)


def _chunks(model: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    return [model] if isinstance(model, nn.Module) else model


def _moe_layers(chunks: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return [(name, block) for chunk in chunks for name, block in chunk.named_modules() if isinstance(block, MoELayer)]


def _configuration(chunks: Sequence[nn.Module]) -> Any:
    """The ``TransformerConfig`` of a model; None if it has none."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return next((module.config for module in modules if has_experts(getattr(module, "config", None))), None)


def _pattern(chunks: Sequence[nn.Module]) -> str | None:
    """A hybrid model's pattern of layers; None for other models."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return next((value for module in modules for value in map(vars(module).get, PATTERNS) if value), None)


def _layer_numbers(chunks: Sequence[nn.Module]) -> set[int]:
    """The numbers of all layers of this rank, dense ones too. An encoder without experts counts its own otherwise."""
    modules = (module for chunk in chunks for module in chunk.modules())
    numbers = (getattr(each, "layer_number", None) for each in modules if has_experts(getattr(each, "config", None)))
    return {number for number in numbers if isinstance(number, int)}
