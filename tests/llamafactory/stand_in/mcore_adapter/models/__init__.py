"""Loads a small GPTModel, whatever the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small_models

from .model_config import McaModelConfig


class VirtualModels(list[Any]):
    """The chunks of a model."""

    @property
    def config(self) -> Any:
        return self[0].config

    def get_models(self) -> list[Any]:
        return self

    def named_parameters(self) -> Any:
        return (named for chunk in self for named in chunk.named_parameters())

    def state_dict(self) -> Any:
        return self[0].state_dict()

    def load_state_dict(self, state: Any) -> None:
        self[0].load_state_dict(state)


class AutoConfig:
    @classmethod
    def from_pretrained(cls, path: str, args: Any) -> dict[str, Any]:
        """The type of the model, and what the YAML sets."""
        file = next(file for name in ("mca_config.json", "config.json") if (file := Path(path, name)).exists())
        values = json.loads(file.read_text())
        return {"hf_model_type": values.get("hf_model_type") or values["model_type"], **args.additional_configs}


class AutoModel:
    @classmethod
    def from_pretrained(cls, path: str, args: Any) -> VirtualModels:
        return cls.from_config(AutoConfig.from_pretrained(path, args))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VirtualModels:
        return VirtualModels(small_models.build_stage(config_class=McaModelConfig, **config))
