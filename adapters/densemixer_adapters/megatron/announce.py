"""What a user is told of a model of Megatron Core: what is attached to it, and which routers are frozen."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from densemixer_adapters.megatron.host_layer import HostLayer
from densemixer_adapters.transformers.announce import announce as log_on_first_rank

logger = logging.getLogger("densemixer")

_FIX = "Call requires_grad_(True) on the router after whatever froze it, e.g. a LoRA transform."
_frozen_was_said = False


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
    """Log one warning in this process, whichever layer comes first."""
    if not _frozen_was_said:
        warn_of_frozen_routers([layer])


def warn_of_frozen_routers(layers: Sequence[HostLayer], fix: str = _FIX) -> None:
    """Log one warning for all of these layers whose router is frozen now.

    Args:
        layers: Those of this rank that DenseMixer is attached to.
        fix: What to do about it in the framework at hand.
    """
    global _frozen_was_said
    frozen = [layer for layer in layers if layer.router_is_frozen]
    if frozen:
        _frozen_was_said = True
        logger.warning(
            "DenseMixer has nothing to train where the router is frozen: %s.router%s. Such a layer trains as without "
            "DenseMixer. %s",
            frozen[0].name,
            f" and {len(frozen) - 1} more" if len(frozen) > 1 else "",
            fix,
        )
