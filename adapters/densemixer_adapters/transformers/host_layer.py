"""A Mixture-of-Experts layer of a model of transformers: where it is, and what can be read off it at any time."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from densemixer_adapters.transformers.experts import unwrap, weight_names
from densemixer_adapters.transformers.routers import Router


class HostLayer:
    """One Mixture-of-Experts layer of a model, which it doesn't keep alive.

    Args:
        name: The block's name in the model, e.g. ``model.layers.0.mlp``.
        block: The module that owns router and experts.
        router_attribute: The block's attribute that holds the router.
        spec: What the router computes.

    Attributes:
        name, router_attribute, spec: As given.
        router_name: The router's name in the model, e.g. ``model.layers.0.mlp.gate``.
    """

    def __init__(self, name: str, block: nn.Module, router_attribute: str, spec: Router) -> None:
        self.name = name
        self.router_attribute = router_attribute
        self.router_name = f"{name}.{router_attribute}" if name else router_attribute
        self.spec = spec
        self._block: weakref.ref[nn.Module] | None = weakref.ref(block)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose block is another."""
        return {**vars(self), "_block": None}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or 'of the block itself'}>"

    def belong_to(self, block: nn.Module) -> None:
        """Say whose layer this is, where the block has been copied."""
        self._block = weakref.ref(block)

    @property
    def knows_block(self) -> bool:
        """Whether it does, or did: a copy's layer learns it in its block's next training forward."""
        return self._block is not None

    @property
    def block(self) -> nn.Module:
        """The module that owns router and experts."""
        block = self.block_or_none
        if block is None:
            raise RuntimeError(f"{self.name}: the model of this layer of DenseMixer is gone")
        return block

    @property
    def block_or_none(self) -> nn.Module | None:
        """None where the block is gone, or isn't known yet, as a copy's."""
        return None if self._block is None else self._block()

    @property
    def router(self) -> nn.Module:
        """The router, as the block calls it now: others may have wrapped it since."""
        router: nn.Module = getattr(self.block, self.router_attribute)
        return router

    @property
    def router_is_frozen(self) -> bool:
        """False too where the block is gone, or isn't known yet, as a copy's."""
        block = self.block_or_none
        return block is not None and self.is_frozen_in(block)

    def is_frozen_in(self, block: nn.Module) -> bool:
        """Whether the router of this block, or of its replica, is frozen."""
        # FSDP1 may have taken the parameters away; then only the graph knows.
        parameters = list(getattr(block, self.router_attribute).parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    @property
    def router_is_linear(self) -> bool:
        """Whether the router's logits are its weight times its input, plus a bias at most."""
        return self.spec.linear and isinstance(getattr(unwrap(self.router), "weight", None), Tensor)

    @property
    def score(self) -> str:
        """The function that makes scores of the router's logits, see `densemixer_core.routing`."""
        return self.spec.score

    @property
    def renormalised(self) -> bool:
        """Whether the selected experts' scores are divided by their sum."""
        return self.spec.is_renormalised([unwrap(self.router), self.block])

    @property
    def experts(self) -> Any:
        """The module with the stacked weights."""
        return unwrap(self.block.get_submodule("experts"))

    @property
    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Those of the experts' two stacked weights, also while ZeRO-3 has partitioned them."""
        weights = [getattr(self.experts, name) for name in weight_names(self.experts)[:2] if name]
        return [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in weights]

    @property
    def stacked_experts(self) -> int:
        """How many experts have weights. By the down projection: LongCat-Flash has further rows in the other one."""
        return self.weight_shapes[1][0]

    @property
    def scored_experts(self) -> int:
        """How many experts have a score: those with weights, and those without."""
        return self.stacked_experts if self.spec.scored is None else int(getattr(unwrap(self.router), self.spec.scored))
