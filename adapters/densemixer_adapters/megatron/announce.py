"""What a user is told of a model of Megatron Core: what is attached to it, and which routers are frozen."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from densemixer_adapters.megatron.host_layer import HostLayer

logger = logging.getLogger("densemixer")

_frozen_was_said = False


def announce(model: object, layers: Sequence[HostLayer], estimator: str) -> None:
    """Log a line at ``info`` on the first rank, and warn of frozen routers on each.

    Args:
        model: The model, or the first of its chunks.
        layers: Those of this rank that DenseMixer is attached to.
        estimator: The option.
    """
    logger.log(
        logging.DEBUG if int(os.environ.get("RANK") or 0) else logging.INFO,
        "DenseMixer is attached to %d layers of this rank's part of %s: estimator %s",
        len(layers),
        type(model).__name__,
        estimator,
    )
    _warn([layer for layer in layers if layer.router_is_frozen])


def warn_of_frozen_router(layer: HostLayer) -> None:
    """Log one warning in this process, whichever layer comes first."""
    if not _frozen_was_said:
        _warn([layer])


def _warn(layers: Sequence[HostLayer]) -> None:
    global _frozen_was_said
    if layers:
        _frozen_was_said = True
        logger.warning(
            "DenseMixer has nothing to train where the router is frozen: %s.router%s. Such a layer trains as without "
            "DenseMixer. Call requires_grad_(True) on the router after whatever froze it, e.g. a LoRA transform.",
            layers[0].name,
            f" and {len(layers) - 1} more" if len(layers) > 1 else "",
        )
