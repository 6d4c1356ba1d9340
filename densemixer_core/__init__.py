"""DenseMixer: train the router of a Mixture-of-Experts layer through all of its experts.

The forward stays the host's sparse one. In the backward, the router's scores of the experts that were *not* selected
receive a straight-through gradient. Read the modules in this order:

- ``config``: the options, `DenseMixerConfig`.
- ``routing``: the router's scores, and the factor between a score and the weight that the layer uses.
- ``estimators``: what gradient an unselected expert's score receives.
- ``sampling``: which pairs of a token and an expert are evaluated when the budget is below 1.
- ``control``: what is known of the pairs that are not evaluated.
- ``weights``: the experts' weights, and how a layer computes with them.
- ``experts``: evaluates ⟨g, E_j(x)⟩ for every token and expert, without keeping an expert's output; ``products``: how.
- ``sampled``: evaluates it for a part of the pairs, and estimates the rest.
- ``straight_through``: the identity function that ties these to autograd.

On a GPU, the folder ``kernel`` has other ways to do what ``products`` does, and takes the fastest.
"""

from densemixer_core.config import DenseMixerConfig
from densemixer_core.control import Known
from densemixer_core.experts import expert_dots, routed_output
from densemixer_core.kernel.activations import Activation, recognise
from densemixer_core.routing import RoutingMismatchError, check_routing, router_scores, selection
from densemixer_core.sampled import sampled_dots, stacked_dots
from densemixer_core.straight_through import ExpertDots, Listener, straight_through
from densemixer_core.weights import Derivation, ExpertLayout, ExpertWeights, StackedExperts, compute_dtype

__all__ = [
    "Activation",
    "DenseMixerConfig",
    "Derivation",
    "ExpertDots",
    "ExpertLayout",
    "ExpertWeights",
    "Known",
    "Listener",
    "RoutingMismatchError",
    "StackedExperts",
    "check_routing",
    "compute_dtype",
    "expert_dots",
    "recognise",
    "routed_output",
    "router_scores",
    "sampled_dots",
    "selection",
    "stacked_dots",
    "straight_through",
]
