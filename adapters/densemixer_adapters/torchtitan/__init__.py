"""DenseMixer in torchtitan: ``--override.imports densemixer_adapters.torchtitan.densemixer``, or `apply_densemixer`.

Options come with the override, ``'densemixer_adapters.torchtitan.densemixer={"estimator": "centered"}'`` on the command
line or ``("densemixer_adapters.torchtitan.densemixer", {"estimator": "centered"})`` in a configuration. It replaces the
configuration of the optimizers, since these are built when the model has all of its parallelism, and attaches then.

``attach``     attaches to a model's layers, and takes off again
``layer``      one layer: what is overridden, and what happens in its backward
``experts``    where the weights of experts are
``refuse``     what can't be trained this way, and why
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive, override

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.switch import read_options
from densemixer_adapters.torchtitan.attach import TorchtitanHandle, apply_densemixer, attached_handle

__all__ = ["TorchtitanHandle", "UnsupportedModelError", "apply_densemixer", "attached_handle", "densemixer"]

SWITCH = f"{__name__}.densemixer"


def densemixer(config: Any, **options: Any) -> Any:
    """The override: the optimizers as they are, and DenseMixer attached to the model that they are built for.

    Args:
        config: The configuration of the optimizers, an ``OptimizersContainer.Config``.
        options: The fields of `densemixer_core.DenseMixerConfig`.

    Raises:
        ValueError: An option is wrong.
    """
    read_options(SWITCH, options)
    return derive(config, _with_densemixer(type(config)._owner).Config, densemixer=options)


override(target=OptimizersContainer.Config, description="DenseMixer: routers learn from all experts.")(densemixer)


def _with_densemixer(owner: Any) -> Any:
    """A class of optimizers that does what ``owner`` does, and attaches DenseMixer to the model."""

    class WithDenseMixer(owner):  # type: ignore[misc]
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(owner.Config):  # type: ignore[misc]
            densemixer: dict[str, Any] = dataclasses.field(default_factory=dict)

        def __init__(self, config: Any, *, model_parts: Any, **others: Any) -> None:
            super().__init__(config, model_parts=model_parts, **others)
            apply_densemixer(model_parts, read_options(SWITCH, config.densemixer))

    # As torchtitan's log has them.
    WithDenseMixer.__name__ = WithDenseMixer.__qualname__ = f"{owner.__name__}WithDenseMixer"
    WithDenseMixer.Config.__qualname__ = f"{owner.__name__}WithDenseMixer.Config"
    return WithDenseMixer
