"""DenseMixer in Megatron Core: ``TransformerConfig(..., moe_densemixer=True)``, or `enable` on a built model.

The field ``moe_densemixer`` of ``TransformerConfig`` and its subclasses is True, False, or a mapping with the fields of
`densemixer_core.DenseMixerConfig`. The functions ``patch_…`` add it; they are called by the boot hook
(`densemixer_adapters._boot`), each right after its module of Megatron Core was imported. Every ``MoELayer`` that is
built from such a configuration has DenseMixer attached.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from densemixer_adapters.layer import UnsupportedModelError
from densemixer_adapters.megatron_layer import (
    MegatronLayer,
    attached_layer,
    moe_layer_numbers,
    refuse,
    warn_of_frozen_routers,
)
from densemixer_core import DenseMixerConfig

logger = logging.getLogger("densemixer")

FLAG = "moe_densemixer"


_FIELD = dataclasses.field(
    default=False,
    kw_only=True,  # so it shifts no argument of a subclass
    metadata={  # Megatron-LM makes its command line of the fields
        "argparse_meta": {
            "nargs": "?",
            "const": True,
            "type": json.loads,
            "metavar": "OPTIONS",
            "help": "Train the routers through all experts (DenseMixer). Options as JSON, e.g. "
            """'{"estimator": "centered"}'.""",
        }
    },
)


def enable(model: nn.Module | Sequence[nn.Module], config: DenseMixerConfig | None = None) -> MegatronHandle:
    """Train the routers of a Megatron Core model through all of their experts.

    The model's outputs stay what they are, bit for bit; nothing is added to its parameters, modules or checkpoints.
    Call it on the built model, on every rank; best before DDP wraps it, as a pre-wrap hook of Megatron-Bridge does:
    ``provider.register_pre_wrap_hook(lambda model: enable(model) and model)``.

    Args:
        model: The model, or its chunks of this pipeline stage.
        config: The options.

    Returns:
        A handle that lists the layers and undoes everything, also as a context manager.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts layers at all, or one that can't be trained this way.
        ValueError: The options select layers that the model doesn't have.
        RuntimeError: DenseMixer is attached already.
    """
    config = config or DenseMixerConfig()
    chunks = _chunks(model)
    blocks = _moe_layers(chunks)
    if not blocks and not any(_has_experts(getattr(chunk, "config", None)) for chunk in chunks):
        raise UnsupportedModelError(
            f"{type(chunks[0]).__name__} has no MoELayer, and its configuration no num_moe_experts. DenseMixer trains "
            "the routers of such layers; switch it off for this model."
        )
    for name, block in blocks:
        if attached_layer(block.router) is not None:
            raise RuntimeError(
                f"{name}: DenseMixer is attached already, by enable or {FLAG}; attached(model).remove() detaches it."
            )
        refuse(name, block)
    layers = [MegatronLayer(name, block, config) for name, block in blocks]
    layers = [layer for layer in layers if layer.is_selected()]
    for layer in layers:
        layer.attach()
    logger.log(
        logging.DEBUG if int(os.environ.get("RANK") or 0) else logging.INFO,
        "DenseMixer is attached to %d layers of this rank's part of %s: estimator %s",
        len(layers),
        type(chunks[0]).__name__,
        config.estimator,
    )
    warn_of_frozen_routers([layer for layer in layers if layer.router_is_frozen])
    return MegatronHandle(layers)


def attached(model: nn.Module | Sequence[nn.Module]) -> MegatronHandle:
    """What is attached to a model, by `enable` or by its configuration. Its ``layers`` may be none."""
    layers = (attached_layer(block.router) for _, block in _moe_layers(_chunks(model)))
    return MegatronHandle([layer for layer in layers if layer is not None])


class MegatronHandle:
    """What is attached to a model. Leaving it as a context manager, or `remove`, detaches it.

    Attributes:
        layers: The layers of this rank, in the model's order.
    """

    def __init__(self, layers: list[MegatronLayer]) -> None:
        self.layers = layers

    def remove(self) -> None:
        """Leave the model as it was. Does nothing the second time."""
        for layer in self.layers:
            layer.remove()

    def __enter__(self) -> MegatronHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def read_flag(config: Any) -> DenseMixerConfig | None:
    """The options in a ``TransformerConfig``; None where DenseMixer is off.

    Raises:
        ValueError: The flag's value or an option is wrong.
    """
    value = getattr(config, FLAG, False)
    if value is None or value is False:
        return None
    if value is True:
        return DenseMixerConfig()
    if not isinstance(value, Mapping):
        raise ValueError(f"{FLAG} must be True, False or a mapping of options, got {value!r}")
    try:
        return DenseMixerConfig.from_dict(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{FLAG}: {error}") from None


def patch_transformer_config(module: Any) -> None:
    """Give ``TransformerConfig`` our field. What is derived from it later inherits it, as any field of a dataclass."""
    config_class = module.TransformerConfig
    setattr(config_class, FLAG, False)  # what asks the class, not its fields, finds it too
    config_class.__annotations__[FLAG] = Any
    with_field = dataclasses.make_dataclass(config_class.__name__, [(FLAG, Any, _FIELD)])
    _add_field(config_class, dataclasses.fields(with_field)[0])
    original = config_class.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807
        original(self)
        options = read_flag(self)
        if options is not None:
            if not _has_experts(self):
                logger.warning("%s has no effect: the model has no experts (num_moe_experts).", FLAG)
            elif options.layers is not None:
                options.positions(len(moe_layer_numbers(self)))

    config_class.__post_init__ = __post_init__


def patch_moe_layer(module: Any) -> None:
    """Attach DenseMixer to each layer that is built from a configuration that asks for it."""
    layer_class = module.MoELayer
    original = layer_class.__init__

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        options = read_flag(config)
        original(self, config, *args, **kwargs)
        if options is not None:
            name = f"Mixture-of-Experts layer {'' if self.layer_number is None else self.layer_number}".strip()
            try:
                refuse(name, self)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{FLAG}: {error}") from None
            MegatronLayer(name, self, options).attach()

    layer_class.__init__ = __init__


def _add_field(config_class: Any, field: dataclasses.Field[Any]) -> None:
    """Add our field to a dataclass, and to those that are derived from it already."""
    config_class.__dataclass_fields__[FLAG] = field
    original = vars(config_class).get("__init__")
    if original is not None:
        signature = inspect.signature(original)
        ours = inspect.Parameter(FLAG, inspect.Parameter.KEYWORD_ONLY, default=False)

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if FLAG in kwargs:
                setattr(self, FLAG, kwargs.pop(FLAG))
            original(self, *args, **kwargs)

        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            signature = signature.replace(parameters=[*signature.parameters.values(), ours])
        __init__.__signature__ = signature  # type: ignore[attr-defined]
        config_class.__init__ = __init__
    for subclass in config_class.__subclasses__():
        _add_field(subclass, field)


def _chunks(model: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    return [model] if isinstance(model, nn.Module) else model


def _moe_layers(chunks: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return [(name, block) for chunk in chunks for name, block in chunk.named_modules() if isinstance(block, MoELayer)]


def _has_experts(config: Any) -> bool:
    return getattr(config, "num_moe_experts", None) is not None
