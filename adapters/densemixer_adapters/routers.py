"""What each router of transformers computes: declared here and nowhere else.

The declaration is compared with the weights that the model really uses at the first training forward of each layer, so
a wrong line here stops the training; it can't bend it silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn


@dataclasses.dataclass(frozen=True)
class Router:
    """How a router turns logits into the weights of the experts it selects.

    Args:
        score: Name of the score function, see `densemixer_core.routing`. Biases, groups and noise that act on the
            selection alone don't matter here.
        renormalised: Whether the scores of the selected experts are divided by their sum: yes, no, or the name of the
            attribute of the router or its block that says so. A softmax over the selected experts' logits is a softmax
            over all that is renormalised.
    """

    score: str
    renormalised: bool | str

    def is_renormalised(self, owners: Iterable[nn.Module]) -> bool:
        """Read the declaration off the first of ``owners`` (router, block) that has the attribute."""
        if isinstance(self.renormalised, bool):
            return self.renormalised
        for owner in owners:
            if hasattr(owner, self.renormalised):
                return bool(getattr(owner, self.renormalised))
        raise AttributeError(f"neither router nor block has an attribute {self.renormalised!r}")


ROUTERS: dict[str, Router] = {
    "DeepseekV3TopkRouter": Router("sigmoid", "norm_topk_prob"),
    "GptOssTopKRouter": Router("softmax", True),
    "MixtralTopKRouter": Router("softmax", True),
    "OlmoeTopKRouter": Router("softmax", "norm_topk_prob"),
    "Qwen2MoeTopKRouter": Router("softmax", "norm_topk_prob"),
    "Qwen3MoeTopKRouter": Router("softmax", "norm_topk_prob"),
}
"""Keyed by the name of the router's class."""
