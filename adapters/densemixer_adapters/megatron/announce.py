"""What a user is told of a model of Megatron Core: what is attached to it, and which routers are frozen."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from densemixer_adapters.megatron.host_layer import HostLayer
from densemixer_adapters.transformers.announce import announce as log_on_first_rank

logger = logging.getLogger("densemixer")

_FIX = "Call requires_grad_(True) on the router after whatever froze it, e.g. a LoRA transform."

_said_of: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The configurations of models whose frozen routers were spoken of, by their ids: what all layers of a model share."""


def announce(model: object, layers: Sequence[HostLayer], estimator: str) -> None:
    """Log a line at ``info`` on the first rank, and warn of frozen routers on each.

    Args:
        model: The model, or the first of its chunks.
        layers: Those of this rank that DenseMixer is attached to.
        estimator: The option.
    """
    log_on_first_rank(
        f"DenseMixer is attached to {len(layers)} layers of this rank's part of {type(model).__name__}: estimator "
        f"{estimator}"
    )
    warn_of_frozen_routers(layers)


def warn_of_frozen_router(layer: HostLayer) -> None:
    """Log one warning for a model, whichever of its layers comes first."""
    if id(layer.block.config) not in _said_of:
        warn_of_frozen_routers([layer])


def warn_of_frozen_routers(layers: Sequence[HostLayer], fix: str = _FIX) -> None:
    """Log one warning for all of these layers whose router is frozen now.

    Args:
        layers: Those of this rank that DenseMixer is attached to.
        fix: What to do about it in the framework at hand.
    """
    frozen = [layer for layer in layers if layer.router_is_frozen]
    if frozen:
        _said_of.update({id(layer.block.config): layer.block.config for layer in frozen})
        logger.warning(
            "DenseMixer has nothing to train where the router is frozen: %s.router%s. Such a layer trains as without "
            "DenseMixer. %s",
            frozen[0].name,
            f" and {len(frozen) - 1} more" if len(frozen) > 1 else "",
            fix,
        )
