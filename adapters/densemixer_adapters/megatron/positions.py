"""Which layers of a Megatron Core model have experts, and which of these the option ``layers`` selects.

A rank holds the layers of its pipeline stage only, so the answer comes from the configuration: the same on every rank.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from densemixer_core import DenseMixerConfig

PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
"""What Megatron Core calls the pattern of a hybrid model's layers: from 0.17 on, and before."""
_EXPERTS, _STAGE, _PREDICTION = "E", "|", "/"
"""In such a pattern: a layer with experts, the bound of a pipeline stage, multi-token prediction."""


def moe_layer_numbers(config: Any, pattern: str | None = None) -> list[int]:
    """The numbers, from 1, of the model's layers that have experts: over all pipeline stages.

    Args:
        config: A ``TransformerConfig``.
        pattern: A hybrid model's pattern of layers. None for other models.

    Raises:
        ValueError: They don't follow from these.
    """
    if config.mtp_num_layers or _PREDICTION in (pattern or ""):
        raise ValueError(
            "layers: the positions of the Mixture-of-Experts layers of a model with multi-token prediction are not "
            "known. Leave `layers` out."
        )
    if pattern is not None:
        kinds = pattern.replace(_STAGE, "")
        return [number for number, kind in enumerate(kinds, 1) if kind == _EXPERTS]
    if getattr(config, "is_hybrid_model", False):
        raise ValueError(
            "layers: the positions of the Mixture-of-Experts layers of a hybrid model are in its pattern of layers, "
            "which is not known here. Leave `layers` out, or call `apply_densemixer` on the whole model."
        )
    frequency, layers = config.moe_layer_freq, range(config.num_layers)
    dense_or_not = [layer % frequency == 0 for layer in layers] if isinstance(frequency, int) else frequency
    return [layer + 1 for layer in layers if dense_or_not[layer]]


class Selection:
    """The layers that the option ``layers`` selects, by their numbers.

    Args:
        config: A ``TransformerConfig``.
        options: The options of DenseMixer.
        pattern: A hybrid model's pattern of layers. None for other models.

    Raises:
        ValueError: The option selects layers that the model doesn't have, or its layers aren't known.
    """

    def __init__(self, config: Any, options: DenseMixerConfig, pattern: str | None = None) -> None:
        self._numbers: list[int] | None = None  # of all layers that have experts; None if all are selected
        self._chosen: set[int] = set()
        if options.layers is not None:
            self._numbers = moe_layer_numbers(config, pattern)
            self._chosen = {self._numbers[position] for position in options.positions(len(self._numbers))}

    def chooses(self, number: int | None) -> bool:
        """Whether the layer of this number, which has experts, is selected.

        Raises:
            ValueError: By the configuration it has none.
        """
        if self._numbers is None:
            return True
        if number not in self._numbers:
            raise ValueError(_mismatch(f"layer {number} has experts", self._numbers))
        return number in self._chosen

    def compare(self, built: Collection[int], with_experts: Collection[int]) -> None:
        """Compare what is expected with the layers that this rank has.

        Args:
            built: The numbers of all its layers.
            with_experts: The numbers of those that have experts.

        Raises:
            ValueError: Others have experts than the configuration says, so positions would count wrongly.
        """
        if self._numbers is None:
            return
        expected = sorted(set(self._numbers) & {*built, *with_experts})
        if expected != sorted(with_experts):
            raise ValueError(_mismatch(f"of this rank's, layers {sorted(with_experts)} have experts", self._numbers))


def _mismatch(found: str, numbers: list[int]) -> str:
    return (
        f"layers: the configuration has the model's experts in layers {numbers}, but {found}. Positions would mean "
        "other layers. Set moe_layer_freq to what the model is built of, or leave `layers` out."
    )


def has_experts(config: Any) -> bool:
    return getattr(config, "num_moe_experts", None) is not None
