"""A plugin of Axolotl for the tests."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from probe import Probe


class ProbePlugin(BasePlugin):
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        Probe(trainer)
