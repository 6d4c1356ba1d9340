"""DenseMixer in LLaMA-Factory: ``use_densemixer: true`` in the YAML.

The optional second key ``densemixer`` takes a mapping with the fields of `densemixer_core.DenseMixerConfig`. An
explicit ``use_densemixer: false`` says no to ``DENSEMIXER_ENABLED=1`` too.

The functions ``patch_…`` are called by the boot hook (`densemixer_adapters._boot`), each right after its module of
LLaMA-Factory was imported. Two modules per engine: the one with the arguments, so that its strict parser knows our
keys, and the one that loads the model, the last point before DDP, FSDP or DeepSpeed wrap it. Only the model to be
trained is touched: reference, reward, chat and export models are loaded with ``is_trainable=False``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from densemixer_adapters.deepspeed import mark_leaf_modules
from densemixer_adapters.environment import left_alone
from densemixer_adapters.switch import is_wrapped, quotes, read_options, wrap
from densemixer_adapters.transformers import DenseMixerHandle, UnsupportedModelError, attach, attached_handle
from densemixer_adapters.transformers.announce import describe
from densemixer_core import DenseMixerConfig


def patch_finetuning_args(module: Any) -> None:
    """Give ``FinetuningArguments`` our two keys."""
    module.FinetuningArguments = _with_keys(module.FinetuningArguments, _check_v0)


def patch_v1_model_args(module: Any) -> None:
    """Give ``ModelArguments`` of the v1 engine our two keys."""
    module.ModelArguments = _with_keys(module.ModelArguments, _check_v1)


def patch_loader(module: Any) -> None:
    """Attach DenseMixer to the model that ``load_model`` loads for training."""

    @wrap(module, "load_model")
    def load_model(
        original: Any,
        tokenizer: Any,
        model_args: Any,
        finetuning_args: Any,
        is_trainable: bool = False,
        add_valuehead: bool = False,
    ) -> Any:
        # The key is missing if its patch failed, which must not stop those who don't use it.
        use = getattr(finetuning_args, "use_densemixer", None)
        if is_trainable and use:
            _check_model_args(model_args)
        with left_alone(use is not None):
            model = original(tokenizer, model_args, finetuning_args, is_trainable, add_valuehead)
        if is_trainable and use:
            _attach(model, finetuning_args.densemixer, _logger())
        if is_trainable and (handle := attached_handle(model)):
            _warn_of_frozen_routers(handle, _fix(handle, finetuning_args))
        return model


def patch_v1_model_engine(module: Any) -> None:
    """Attach DenseMixer to the model that the v1 engine loads for training."""

    @wrap(module.ModelEngine, "_init_model")
    def _init_model(original: Any, self: Any) -> Any:
        use = getattr(self.args, "use_densemixer", None)
        with left_alone(use is not None):
            model = original(self)
        if self.is_train and use:
            _attach(model, self.args.densemixer, _v1_logger())
        if self.is_train and self.args.peft_config and (handle := attached_handle(model)):
            _warn_of_frozen_routers(handle, _v1_fix(handle, self.args.peft_config))
        return model


def _with_keys(arguments: type, check: Callable[[Any], None]) -> type:
    """A subclass of a dataclass of arguments that takes its place, name included, with our keys after its own."""

    def post_init(self: Any) -> None:
        arguments.__post_init__(self)  # type: ignore[attr-defined]
        self.densemixer = _parse_options(self.densemixer)
        if not isinstance(self.use_densemixer, bool | None):
            value = self.use_densemixer
            raise ValueError(f"use_densemixer must be true or false, got {value!r}{quotes(value)}")
        if self.use_densemixer:
            check(self)
        elif self.densemixer is not None:
            logging.getLogger("densemixer").warning("densemixer has no effect without use_densemixer: true.")

    use = dataclasses.field(
        default=None,  # false, unless DENSEMIXER_ENABLED=1 says otherwise
        metadata={
            "help": "Whether or not to train the routers of an MoE model through all experts (DenseMixer).",
            # The argument parser passes these on. It doesn't set them by itself where the default is None.
            "nargs": "?",
            "const": True,
        },
    )
    options = dataclasses.field(
        default=None,
        metadata={
            "help": "Options of DenseMixer, e.g. `{estimator: centered, layers: '-4:'}`. JSON on the command line."
        },
    )
    subclass = dataclasses.make_dataclass(
        arguments.__name__,
        # The argument parser of transformers asks for a `str` in a union.
        [("use_densemixer", bool | None, use), ("densemixer", dict | str | None, options)],
        bases=(arguments,),
        namespace={"__post_init__": post_init, "__doc__": arguments.__doc__},
    )
    subclass.__module__, subclass.__qualname__ = arguments.__module__, arguments.__qualname__  # Ray pickles it by name
    return subclass


def _parse_options(options: Any) -> dict[str, Any] | None:
    """Options as a mapping. A wrong key or value is an error here, before anything is loaded."""
    if options is None:
        return None
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError as error:
            wanted = "a mapping such as {estimator: centered}, or one as JSON"
            raise ValueError(f"densemixer must be {wanted}, got {options!r} ({error})") from None
    read_options("densemixer", options)
    return dict(options)


def _check_v0(arguments: Any) -> None:
    from llamafactory.extras.misc import is_env_enabled
    from llamafactory.model import loader

    if arguments.use_hyper_parallel:
        _refuse("HyperParallel has its own parallel layers, and is untested", "drop use_hyper_parallel")
    _check_hook(loader.load_model, "llamafactory.model.loader.load_model")
    if is_env_enabled("USE_MCA"):
        from llamafactory.train.mca import workflow

        _check_hook(workflow.run_sft, "llamafactory.train.mca.workflow.run_sft")


def _check_v1(arguments: Any) -> None:
    from llamafactory.v1.core.model_engine import ModelEngine

    _check_hook(ModelEngine._init_model, "llamafactory.v1.core.model_engine.ModelEngine._init_model")
    if (arguments.densemixer or {}).get("metrics"):
        raise ValueError(
            "densemixer: metrics is not available in the v1 engine, whose trainer has no callbacks; drop it."
        )


def _check_model_args(model_args: Any) -> None:
    if model_args.use_unsloth:
        _refuse("Unsloth replaces the forwards of the model by its own", "drop use_unsloth")
    if model_args.use_kt:
        _refuse("KTransformers computes the experts outside of torch's autograd", "drop use_kt")
    checkpointing = not model_args.disable_gradient_checkpointing and model_args.use_reentrant_gc
    if model_args.moe_aux_loss_coef and checkpointing:
        _logger().warning_rank0(
            "moe_aux_loss_coef gives the routers no gradient under reentrant gradient checkpointing, with or without "
            "DenseMixer: their output is recorded in the pass without gradients. Set "
            "`use_reentrant_gc: false` to train them with the auxiliary loss too."
        )


def _check_hook(function: Any, name: str) -> None:
    if not is_wrapped(function):
        raise RuntimeError(
            f"use_densemixer: {name} was not hooked, so DenseMixer would have no effect. `densemixer doctor` says "
            "which versions of LLaMA-Factory are supported."
        )


def _refuse(reason: str, fix: str) -> None:
    raise ValueError(f"use_densemixer is not supported here: {reason}. Either {fix}, or use_densemixer.")


def _attach(model: nn.Module, options: dict[str, Any] | None, logger: Any) -> None:
    import transformers.trainer
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from densemixer_adapters.callback import patch_trainer

    config = DenseMixerConfig.from_dict(options or {})
    try:
        handle = attach(model, config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"use_densemixer: {error}") from None
    except ValueError as error:
        raise ValueError(f"densemixer: {error}") from None
    if config.metrics:
        patch_trainer(transformers.trainer)
    if is_deepspeed_zero3_enabled():
        mark_leaf_modules(handle)
    logger.info_rank0(f"{describe(model, handle.layers)}.")


def _warn_of_frozen_routers(handle: DenseMixerHandle, fix: str | None) -> None:
    """Now, and in the first step of training, in terms of LLaMA-Factory's keys.

    It is no error, even if all are frozen: LoRA on attention alone is training as without DenseMixer.
    """
    handle.frozen_routers.fix = f"In the YAML, set {fix}." if fix else None
    handle.frozen_routers.warn()


def _fix(handle: DenseMixerHandle, arguments: Any) -> str | None:
    """What to set to make frozen routers trainable; None where layers take turns to be trained."""
    if arguments.use_badam:
        return None
    if arguments.finetuning_type == "freeze":
        return _fix_of_freeze(handle, arguments.freeze_trainable_modules)
    return "freeze_language_model: false" if arguments.finetuning_type == "full" else "additional_target: {router}"


def _v1_fix(handle: DenseMixerHandle, peft_config: Any) -> str:
    fix = "modules_to_save: [{router}]"
    if peft_config.name == "freeze":
        fix = _fix_of_freeze(handle, peft_config.get("freeze_trainable_modules", "all"))
    return f"{fix} in peft_config"


def _fix_of_freeze(handle: DenseMixerHandle, trainable: str | Sequence[str]) -> str:
    """Of the last layers, or the first, LLaMA-Factory trains the modules with these names, or ``all``."""
    names = [name.strip() for name in trainable.split(",")] if isinstance(trainable, str) else [*trainable]
    inner = re.split(r"\.\d+\.", handle.layers[0].router_name)[-1].partition(".")[0]
    if "all" not in names and inner not in names:
        return f"freeze_trainable_modules: {','.join([*names, inner])}"
    return "more layers in freeze_trainable_layers, or `densemixer: {{layers: ...}}` to those that you train"


def _logger() -> Any:
    from llamafactory.extras.logging import get_logger

    return get_logger("llamafactory.densemixer")


def _v1_logger() -> Any:
    from llamafactory.v1.utils.logging import get_logger

    return get_logger("llamafactory.v1.densemixer")
