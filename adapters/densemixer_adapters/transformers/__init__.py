"""DenseMixer on a live model of transformers 5: `apply_densemixer`.

``attach``      attaches to a model, and takes off again
``find``        the layers of a model, and what is refused
``routers``     what each router computes, as declarations that are checked when a layer runs
``layer``       one layer: what its hooks do in a forward and in its backward
``calls``       the forward that is under way, and the hooks by which router and experts report to it
``checks``      what is declared against what the layer did
``experts``     the host's modules with stacked weights
``weights``     how to read these: parametrised, quantised, with adapters
``announce``    what a user is told
``cost``        what a layer costs
``parallel``    how transformers spreads experts over ranks, and ``veomni`` how VeOmni does
"""

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.transformers.attach import (
    DenseMixerHandle,
    apply_densemixer,
    attach,
    attached_handle,
    attached_layers,
    has_experts,
)
from densemixer_adapters.transformers.layer import DenseMixerLayer

__all__ = [
    "DenseMixerHandle",
    "DenseMixerLayer",
    "UnsupportedModelError",
    "apply_densemixer",
    "attach",
    "attached_handle",
    "attached_layers",
    "has_experts",
]
