"""The original package, ``densemixer`` on PyPI, in the same process.

Under ``DENSEMIXER_ENABLED=1`` it replaces the forward of the blocks of Qwen3-MoE, Qwen2-MoE and OLMoE in transformers.
That forward is written for transformers 4: with version 5 it fails in the first step, in code that names neither
package. Both can't train one model anyway.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.errors import UnsupportedModelError

PACKAGE = "densemixer"
FIX = (
    f"Uninstall it (`pip uninstall {PACKAGE}`), or have nothing import it; `python -m densemixer_adapters doctor` says "
    "what does"
)

logger = logging.getLogger("densemixer")


def refuse_patched(block: nn.Module, where: str) -> None:
    """Refuse a Mixture-of-Experts block whose forward the original has replaced.

    Args:
        block: The block.
        where: Its name and class, for the message.

    Raises:
        UnsupportedModelError: It has.
    """
    owner = type(block).forward.__module__ or ""
    if owner.split(".")[0] == PACKAGE:
        raise UnsupportedModelError(
            f"{where}: the original package `{PACKAGE}` has been imported in this process and has replaced the forward "
            f"of this class by its own, which fails with transformers 5. {FIX}."
        )


def warn_of_patches(module: Any) -> None:
    """Called where the original is imported under ``DENSEMIXER_ENABLED=1``, which switches both packages on.

    Args:
        module: ``densemixer.patching``.
    """
    logger.warning(
        "%s=1 switches on both densemixer-adapters and the original package `%s`, which is being imported here: it "
        "replaces the forward of Qwen3-MoE, Qwen2-MoE and OLMoE, which then fail with transformers 5. %s.",
        ENABLED,
        module.__name__.split(".")[0],
        FIX,
    )
