"""DenseMixer in Axolotl: its own YAML for the original package, with one line changed.

``plugins: [densemixer_adapters.axolotl.DenseMixerPlugin]`` takes the place of
``axolotl.integrations.densemixer.DenseMixerPlugin``. ``dense_mixer`` is true, false, or a mapping with the fields of
`densemixer_core.DenseMixerConfig`; without it, the plugin is on, as Axolotl's own is. An explicit ``false`` says no to
``DENSEMIXER_ENABLED=1`` too.

Only the model of the trainer is attached to: Axolotl's loader also makes reference models, and models that are merged
or that answer. `patch_densemixer_plugin` is called by the boot hook (`densemixer_adapters._boot`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import transformers
from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from packaging.version import Version
from pydantic import BaseModel, field_validator
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from densemixer_adapters.axolotl_config import PLUGIN, SWITCH
from densemixer_adapters.callback import DenseMixerCallback
from densemixer_adapters.deepspeed import mark_leaf_modules
from densemixer_adapters.environment import left_alone
from densemixer_adapters.switch import looks_like, read_switch, wrap
from densemixer_adapters.transformers import UnsupportedModelError, attach
from densemixer_adapters.transformers.announce import describe
from densemixer_core import DenseMixerConfig

AXOLOTLS_PLUGIN = "axolotl.integrations.densemixer.DenseMixerPlugin"

logger = get_logger("axolotl.densemixer")  # of others, Axolotl shows warnings alone


class DenseMixerSwitch(BaseModel):  # type: ignore[misc]  # skipped
    """What the plugin adds to Axolotl's schema.

    Args:
        dense_mixer: Whether to train the routers through all experts, or the options to do so with.
    """

    dense_mixer: bool | dict[str, Any] = True

    @field_validator(SWITCH, mode="before")  # type: ignore[untyped-decorator]
    @classmethod
    def _check(cls, value: Any) -> Any:
        """A wrong value is an error here, before anything is loaded."""
        read_switch(SWITCH, value)
        return value


class DenseMixerPlugin(BasePlugin):  # type: ignore[misc]  # skipped
    """Attaches DenseMixer to the model that Axolotl trains, and adds router metrics to its log."""

    def __init__(self) -> None:
        super().__init__()
        self._loading = contextlib.ExitStack()

    def get_input_args(self) -> str:
        """Where Axolotl finds our part of its schema."""
        return f"{DenseMixerSwitch.__module__}.{DenseMixerSwitch.__name__}"

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Called with the YAML as it stands.

        Raises:
            ValueError: DenseMixer doesn't work with another line of it, or a key looks like a misspelling of ours.
        """
        refuse_misspelt_keys(cfg)
        if is_on(cfg):
            refuse_expert_parallelism(cfg)

    def pre_model_load(self, cfg: Any) -> None:
        """Called before a model is loaded: the environment's switch doesn't count, as this one is here."""
        self._loading.enter_context(left_alone())

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Called after a model was loaded."""
        self._loading.close()

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[TrainerCallback]:
        """Called before the trainer is made."""
        config = options(cfg)
        return [DenseMixerCallback()] if config and config.metrics else []

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Called with the trainer, whose model has its adapters and is frozen where it will be, but isn't wrapped yet.

        Raises:
            UnsupportedModelError: The model has no experts, or some that DenseMixer can't train.
            ValueError: The options select layers that the model doesn't have.
        """
        config = options(cfg)
        if config is None:
            return
        try:
            handle = attach(trainer.model, config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{SWITCH}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{SWITCH}: {error}") from None
        if is_deepspeed_zero3_enabled():
            mark_leaf_modules(handle)
        logger.info(f"{describe(trainer.model, handle.layers)}.")
        if fix := fix_of_frozen_routers(cfg):
            handle.frozen_routers.fix = fix
        handle.frozen_routers.warn()


def options(cfg: Any) -> DenseMixerConfig | None:
    """The options in Axolotl's configuration, once it has been validated; None if DenseMixer is off."""
    return read_switch(SWITCH, cfg.dense_mixer)


def is_on(cfg: Mapping[str, Any]) -> bool:
    """Whether a YAML that has one of the two plugins asks for DenseMixer. What is wrong is said later."""
    value = cfg.get(SWITCH, True)
    return value is not None and value is not False  # a mapping without options asks for it too


def refuse_misspelt_keys(cfg: Mapping[str, Any]) -> None:
    """Axolotl drops what its schema doesn't have, and without our key the plugin is on with the default options.

    Raises:
        ValueError: A key looks like a misspelling of ours, or is what other frameworks call it.
    """
    for key in map(str, cfg):
        if key != SWITCH and looks_like(key, SWITCH):
            raise ValueError(f"{key}: no such key; did you mean {SWITCH}?")


def refuse_expert_parallelism(cfg: Mapping[str, Any]) -> None:
    """Axolotl's own leaves each rank some of the experts, and nothing in the model says which.

    Raises:
        ValueError: It is on.
    """
    if (cfg.get("expert_parallel_size") or 1) != 1:
        raise ValueError(
            f"{SWITCH} is not supported with expert_parallel_size: {cfg['expert_parallel_size']}: Axolotl's expert "
            "parallelism (DeepEP) keeps only some of the experts on each rank, and DenseMixer needs all of them. "
            f"Either drop expert_parallel_size, or set {SWITCH}: false."
        )


def fix_of_frozen_routers(cfg: Any) -> str | None:
    """What to set to have routers trained, with ``{router}`` for their name; None if Axolotl has frozen nothing."""
    if cfg.adapter:
        return "In the YAML, set lora_modules_to_save: [{router}]."
    if cfg.unfrozen_parameters:
        return "In the YAML, add {router}.weight to unfrozen_parameters."
    return None


def patch_densemixer_plugin(module: Any) -> None:
    """Have Axolotl's plugin for the original package say what to write instead, where the original can't work.

    Args:
        module: ``axolotl.integrations.densemixer.plugin``.
    """

    @wrap(module.DenseMixerPlugin, "register")
    def register(original: Any, self: Any, cfg: Mapping[str, Any]) -> None:
        if is_on(cfg) and Version(transformers.__version__).major >= 5:
            raise ValueError(
                f"{AXOLOTLS_PLUGIN} is for the original package `densemixer`, which fails in the first step with "
                f"transformers 5, and this is {transformers.__version__}. In the YAML's plugins, write {PLUGIN} in its "
                f"place ({SWITCH} stays as it is), or set {SWITCH}: false."
            )
        original(self, cfg)
