"""DenseMixer on a live model of transformers 5: `apply_densemixer`; `register_router` for a router of your own.

``attach``        attaches to a model
``attached``      the handle: what takes it off again, and warns of what is noticed later
``find``          the layers of a model
``refuse``        what DenseMixer can't work with in a layer
``routers``       what each router computes, as declarations that are checked when a layer runs
``host_layer``    one layer: where it is, and what can be read off it
``layer``         what its hooks do in a forward and in its backward
``calls``         the forward that is under way, and the hooks by which router and experts report to it
``checks``        what is declared against what the layer did
``layer_checks``  when that is compared
``experts``       the host's modules with stacked weights
``weights``       how to read these: parametrised, quantised, with adapters
``parallel``      how transformers spreads them over ranks, and ``veomni`` how VeOmni does
``announce``      what a user is told, ``frozen_routers`` and ``latecomers`` some of it
``cost``          what a layer costs
"""

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.transformers.attach import apply_densemixer, attach, has_experts
from densemixer_adapters.transformers.attached import DenseMixerHandle, attached_handle, attached_layers
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_adapters.transformers.routers import Router, register_router

__all__ = [
    "DenseMixerHandle",
    "DenseMixerLayer",
    "Router",
    "UnsupportedModelError",
    "apply_densemixer",
    "attach",
    "attached_handle",
    "attached_layers",
    "has_experts",
    "register_router",
]
