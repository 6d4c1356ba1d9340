"""DenseMixer in Megatron Core: ``TransformerConfig(..., moe_densemixer=True)``, or `enable` on a built model.

The field ``moe_densemixer`` of ``TransformerConfig`` and its subclasses is True, False, or a mapping with the fields of
`densemixer_core.DenseMixerConfig`. The functions ``patch_…`` add it; they are called by the boot hook
(`densemixer_adapters._boot`), each right after its module of Megatron Core was imported. Every ``MoELayer`` that is
built from such a configuration has DenseMixer attached.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.megatron_layer import MegatronLayer, attached_layer, warn_of_frozen_routers
from densemixer_adapters.megatron_metrics import measure, want_metrics
from densemixer_adapters.megatron_positions import PATTERNS, Selection
from densemixer_adapters.megatron_refuse import refuse_config
from densemixer_adapters.switch import is_wrapped, read_switch, wrap
from densemixer_core import DenseMixerConfig

logger = logging.getLogger("densemixer")

FLAG = "moe_densemixer"
_PATTERN = "_densemixer_pattern"
"""The attribute of a configuration that has a hybrid model's pattern of layers while the model is built from it."""


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
        ValueError: The options select layers that the model doesn't have, or its layers aren't known.
        RuntimeError: DenseMixer is attached already.
    """
    options = config or DenseMixerConfig()
    chunks = _chunks(model)
    paths = _moe_layers(chunks)
    settings = _configuration(chunks)
    if not _has_experts(settings):
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
                f"{layer.name}: DenseMixer is attached already, by enable or {FLAG}; attached(model).remove() detaches "
                "it."
            )
        layer.check_block()
    selection.compare(_layer_numbers(chunks), [layer.block.layer_number for layer in layers])
    layers = [layer for layer in layers if layer.is_selected()]
    for layer in layers:
        layer.attach()
    if options.metrics:
        want_metrics()
    logger.log(
        logging.DEBUG if int(os.environ.get("RANK") or 0) else logging.INFO,
        "DenseMixer is attached to %d layers of this rank's part of %s: estimator %s",
        len(layers),
        type(chunks[0]).__name__,
        options.estimator,
    )
    warn_of_frozen_routers([layer for layer in layers if layer.router_is_frozen])
    return MegatronHandle(layers)


def attached(model: nn.Module | Sequence[nn.Module]) -> MegatronHandle:
    """What is attached to a model, by `enable` or by its configuration. Its ``layers`` may be none."""
    layers = (attached_layer(block.router) for _, block in _moe_layers(_chunks(model)))
    return MegatronHandle([layer for layer in layers if layer is not None])


def wants_metrics(model: nn.Module | Sequence[nn.Module]) -> bool:
    """Whether a model's configuration asks for router metrics: the same on every rank."""
    options = read_flag(_configuration(_chunks(model)))
    return options is not None and options.metrics


class MegatronHandle:
    """What is attached to a model. Leaving it as a context manager, or `remove`, detaches it.

    Attributes:
        layers: The layers of this rank, in the model's order.
    """

    def __init__(self, layers: list[MegatronLayer]) -> None:
        self.layers = layers

    def metrics(self) -> dict[str, float]:
        """Router metrics of the last step: ``densemixer/NAME``, ``densemixer/layer_N/NAME`` with layers from 0.

        For training loops that Megatron Core doesn't log for. Collective: all ranks of the model call it after each
        step, also those that hold none of its layers; all get the same. Nothing without the option ``metrics``.
        """
        return measure(self.layers)

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
    return read_switch(FLAG, getattr(config, FLAG, None))


def patch_transformer_config(module: Any) -> None:
    """Give ``TransformerConfig`` our field. What is derived from it later inherits it, as any field of a dataclass."""
    config_class = module.TransformerConfig
    setattr(config_class, FLAG, False)  # what asks the class, not its fields, finds it too
    config_class.__annotations__[FLAG] = Any
    with_field = dataclasses.make_dataclass(config_class.__name__, [(FLAG, Any, _FIELD)])
    _add_field(config_class, dataclasses.fields(with_field)[0])

    @wrap(config_class, "__post_init__")
    def __post_init__(original: Any, self: Any) -> None:  # noqa: N807
        original(self)
        options = read_flag(self)
        if options is None:
            return
        if not _has_experts(self):
            logger.warning("%s has no effect: the model has no experts (num_moe_experts).", FLAG)
            return
        _refuse_by_flag(self, options)
        if options.metrics:
            want_metrics()
        if not getattr(self, "is_hybrid_model", False):  # whose pattern of layers comes with the model
            Selection(self, options)


def patch_moe_layer(module: Any) -> None:
    """Attach DenseMixer to each layer that is built from a configuration that asks for it."""

    @wrap(module.MoELayer, "__init__")
    def __init__(original: Any, self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        options = read_flag(config)
        if options is None:
            original(self, config, *args, **kwargs)
            return
        _refuse_by_flag(config, options)  # again: it may have been changed since it was made
        selection = Selection(config, options, getattr(config, _PATTERN, None))
        original(self, config, *args, **kwargs)
        MegatronLayer(self, options, selection).attach()

    @wrap(module.MoELayer, "set_layer_number")
    def set_layer_number(original: Any, self: Any, layer_number: int) -> None:
        original(self, layer_number)
        layer = attached_layer(self.router)
        if layer is not None:
            try:
                layer.check_block()
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{FLAG}: {error}") from None


def patch_hybrid_model(module: Any) -> None:
    """Have the layers of a hybrid model know its pattern while they are built: their configuration hasn't got it."""
    model_class = getattr(module, "HybridModel", None) or module.MambaModel
    if is_wrapped(model_class.__init__):  # the module of MambaModel has HybridModel too where it is derived from that
        return
    signature = inspect.signature(model_class.__init__)

    @wrap(model_class, "__init__")
    def __init__(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        given = signature.bind(self, *args, **kwargs).arguments
        config = given["config"]
        # Without a pattern, by shares of attention and MLP, no layer has experts.
        pattern = next((given[name] for name in PATTERNS if given.get(name)), "")
        options = read_flag(config)
        if options is not None and _has_experts(config):
            Selection(config, options, pattern)
        setattr(config, _PATTERN, pattern)
        try:
            original(self, *args, **kwargs)
        finally:
            delattr(config, _PATTERN)


def _refuse_by_flag(config: Any, options: DenseMixerConfig) -> None:
    try:
        refuse_config(config, options)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{FLAG}: {error}") from None


def _add_field(config_class: Any, field: dataclasses.Field[Any]) -> None:
    """Add our field to a dataclass, and to those that are derived from it already."""
    config_class.__dataclass_fields__[FLAG] = field
    if "__init__" in vars(config_class):
        signature = inspect.signature(config_class.__init__)
        ours = inspect.Parameter(FLAG, inspect.Parameter.KEYWORD_ONLY, default=False)

        @wrap(config_class, "__init__")
        def __init__(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if FLAG in kwargs:
                setattr(self, FLAG, kwargs.pop(FLAG))
            original(self, *args, **kwargs)

        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            signature = signature.replace(parameters=[*signature.parameters.values(), ours])
        __init__.__signature__ = signature
    for subclass in config_class.__subclasses__():
        _add_field(subclass, field)


def _chunks(model: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    return [model] if isinstance(model, nn.Module) else model


def _moe_layers(chunks: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return [(name, block) for chunk in chunks for name, block in chunk.named_modules() if isinstance(block, MoELayer)]


def _configuration(chunks: Sequence[nn.Module]) -> Any:
    """The ``TransformerConfig`` of a model; None if it has none."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return next((module.config for module in modules if _has_experts(getattr(module, "config", None))), None)


def _pattern(chunks: Sequence[nn.Module]) -> str | None:
    """A hybrid model's pattern of layers; None for other models."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return next((value for module in modules for value in map(vars(module).get, PATTERNS) if value), None)


def _layer_numbers(chunks: Sequence[nn.Module]) -> set[int]:
    """The numbers of all layers of this rank, dense ones too. An encoder without experts counts its own otherwise."""
    modules = (module for chunk in chunks for module in chunk.modules())
    numbers = (getattr(each, "layer_number", None) for each in modules if _has_experts(getattr(each, "config", None)))
    return {number for number in numbers if isinstance(number, int)}


def _has_experts(config: Any) -> bool:
    return getattr(config, "num_moe_experts", None) is not None
