"""What DeepSpeed ZeRO-3 needs besides `densemixer_adapters.transformers`.

ZeRO-3 partitions parameters and brings them back module by module, in an order that it records. In the backward,
DenseMixer runs parts of the experts once more (their activation function, in some models a norm). To ZeRO-3 these are
forwards, in a number that depends on the batch, and it drops the recorded order and with it the prefetching. As a leaf,
a block has its parameters brought back as a whole, and nothing inside it is watched. Gradients are the same either way.
"""

from __future__ import annotations

from densemixer_adapters.transformers import DenseMixerHandle


def mark_leaf_modules(handle: DenseMixerHandle, leaf: bool = True) -> None:
    """Make every block that DenseMixer is attached to a leaf module of ZeRO-3, whatever its class.

    Call it before ``deepspeed.initialize``, ``accelerator.prepare`` or the HF Trainer's ``train``, which read the
    marks; no other setting is needed. Without ZeRO-3 the marks are without effect.

    Args:
        handle: What `densemixer_adapters.transformers.apply_densemixer` returned.
        leaf: False takes the marks away.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in handle.layers:
        set_z3_leaf_module(layer.block, leaf)
