"""A plugin of Axolotl for the tests."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from probe import Probe


class ProbePlugin(BasePlugin):
    def pre_model_load(self, cfg: Any) -> None:
        if cfg.world_size > 1:
            cfg.device_map = None  # Axolotl's names an accelerator by its number, and there is none

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        Probe(trainer)
