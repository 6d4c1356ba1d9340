"""DenseMixer in Megatron Core: ``TransformerConfig(..., moe_densemixer=True)``, or `enable` on a built model.

The field ``moe_densemixer`` of ``TransformerConfig`` and its subclasses is True, False, or a mapping with the fields of
`densemixer_core.DenseMixerConfig`. The functions ``patch_…`` add it; they are called by the boot hook
(`densemixer_adapters._boot`), each right after its module of Megatron Core was imported. Every ``MoELayer`` that is
built from such a configuration has DenseMixer attached.
"""

from densemixer_adapters.megatron.attach import MegatronHandle, attached, enable, wants_metrics
from densemixer_adapters.megatron.config_field import FLAG, read_flag

__all__ = ["FLAG", "MegatronHandle", "attached", "enable", "read_flag", "wants_metrics"]
