"""DenseMixer in Megatron Core: ``TransformerConfig(..., moe_densemixer=True)``, or `apply_densemixer` on a built model.

The field ``moe_densemixer`` of ``TransformerConfig`` and its subclasses is True, False, or a mapping with the fields of
`densemixer_core.DenseMixerConfig`. The functions ``patch_…`` add it; they are called by the boot hook
(`densemixer_adapters._boot`), each right after its module of Megatron Core was imported. Every ``MoELayer`` that is
built from such a configuration has DenseMixer attached.

``attach``          attaches to a built model, and takes off again
``config_field``    the field of the configuration
``positions``       which layers have experts, and which of these are selected
``refuse``          what DenseMixer can't work with
``host_layer``      one ``MoELayer``: which it is, and what can be read off it
``layer``           what is overridden of it, in a forward, and what its backward does
``running``         what is known of it between these methods
``overrides``       how methods of one object are overridden
``experts``         where the experts' weights are
``experts_check``   whether the experts compute what these say
``shared_experts``  what Megatron adds beside them
``metrics``         router metrics, where Megatron logs its own
``announce``        what a user is told
"""

from densemixer_adapters.megatron.attach import MegatronHandle, apply_densemixer, attached_handle, wants_metrics
from densemixer_adapters.megatron.config_field import FLAG, read_flag

enable = apply_densemixer
"""The same under an older name, and so is `attached`."""
attached = attached_handle

__all__ = [
    "FLAG",
    "MegatronHandle",
    "apply_densemixer",
    "attached",
    "attached_handle",
    "enable",
    "read_flag",
    "wants_metrics",
]
