"""A configuration of Megatron Core that is written to checkpoints with all of its fields, as mcore_adapter does it."""

from __future__ import annotations

import dataclasses
import json

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclasses.dataclass
class PretrainedConfig:
    hf_model_type: str | None = None

    def to_json_string(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: value for name, value in values.items() if isinstance(value, int | float | str | dict | None)}
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"


@dataclasses.dataclass
class McaModelConfig(TransformerConfig, PretrainedConfig):
    """As mcore_adapter's, a configuration of both kinds."""
