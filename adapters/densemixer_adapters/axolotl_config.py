"""Our key in a YAML of Axolotl where no plugin reads it.

Axolotl drops what its schema doesn't have without a word, and goes on without a plugin that it can't load.
`patch_config` is called by the boot hook (`densemixer_adapters._boot`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from densemixer_adapters.switch import looks_like, wrap

SWITCH = "dense_mixer"
PLUGIN = "densemixer_adapters.axolotl.DenseMixerPlugin"


def patch_config(module: Any) -> None:
    """Have the check of a configuration refuse our key, or what looks like it, if it isn't left afterwards.

    Args:
        module: ``axolotl.utils.config``.
    """

    @wrap(module, "validate_config")
    def validate_config(original: Any, cfg: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(cfg)
        checked = original(cfg, *args, **kwargs)
        for key, value in given.items():
            if looks_like(key, SWITCH) and key not in checked and value is not None and value is not False:
                raise ValueError(
                    f"{key}: none of the YAML's plugins reads it, so Axolotl would train without DenseMixer. Add "
                    f"{PLUGIN} to them (if it is there, Axolotl's log says why it failed to load), or leave {key} out."
                )
        return checked
