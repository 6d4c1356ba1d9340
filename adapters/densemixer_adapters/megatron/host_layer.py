"""A ``MoELayer`` of Megatron Core: which it is, and what can be read off it at any time."""

from __future__ import annotations

from typing import Any

from torch import nn


class HostLayer:
    """One ``MoELayer``.

    Args:
        block: The ``MoELayer``.
        path: Its name in this rank's part of the model, if it is known.

    Attributes:
        block: As given.
    """

    def __init__(self, block: Any, path: str = "") -> None:
        self.block = block
        self._path = path

    @property
    def name(self) -> str:
        """With its number in the whole model: the names of modules count from the pipeline stage's first layer."""
        prediction = "multi-token prediction, " if self.is_for_prediction else ""
        number = "" if self.block.layer_number is None else f" {self.block.layer_number}"
        path = f" ({self._path} on this rank)" if self._path else ""
        return f"{prediction}Mixture-of-Experts layer{number}{path}"

    @property
    def is_for_prediction(self) -> bool:
        """Whether it is known to be for multi-token prediction: such a layer is not of the model's own."""
        return bool(getattr(self.block, "is_mtp_layer", False))

    @property
    def router(self) -> nn.Module:
        router: nn.Module = self.block.router
        return router

    @property
    def router_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.router.parameters())

    @property
    def router_is_linear(self) -> bool:
        return True

    @property
    def score(self) -> str:
        """The function that makes scores of the router's logits, see `densemixer_core.routing`."""
        score: str = self.block.config.moe_router_score_function
        return score

    @property
    def renormalised(self) -> bool:
        config = self.block.config
        if config.moe_router_score_function == "softmax":
            return not config.moe_router_pre_softmax  # a softmax over the selected logits
        return bool(self.block.router.topk > 1)

    @property
    def epsilon(self) -> float:
        """What Megatron adds to the sum of the selected scores; a softmax over the selected logits needs nothing."""
        return 1e-20 if self.renormalised and self.block.config.moe_router_score_function != "softmax" else 0.0
