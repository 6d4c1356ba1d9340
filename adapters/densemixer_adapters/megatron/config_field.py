"""The field ``moe_densemixer`` of ``TransformerConfig``: layers that are built from it have DenseMixer attached."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from typing import Any

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.megatron.layer import MegatronLayer, attached_layer
from densemixer_adapters.megatron.metrics import want_metrics
from densemixer_adapters.megatron.positions import PATTERNS, Selection, has_experts
from densemixer_adapters.megatron.refuse import refuse_config
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
        if not has_experts(self):
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
        if options is not None and has_experts(config):
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
