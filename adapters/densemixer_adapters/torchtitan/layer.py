"""One Mixture-of-Experts layer of torchtitan with DenseMixer.

Routing, dispatch, experts and combination stay torchtitan's own. A hook on the router sees the scores of all experts;
``dispatch`` and ``combine`` of the token dispatcher, overridden on the instance, see what the experts get and what
comes of it, as plain tensors of this rank in every kind of parallelism.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from densemixer_adapters.expert_parallel import Spread
from densemixer_adapters.torchtitan import experts as weights_of
from densemixer_adapters.torchtitan.refuse import refuse_capture, refuse_compiling
from densemixer_adapters.transformers.checks import TOKENS, OutputMismatchError, Recurring, check_output
from densemixer_adapters.transformers.frozen_routers import FrozenRouters
from densemixer_core import (
    DenseMixerConfig,
    Known,
    RoutingMismatchError,
    StackedExperts,
    check_routing,
    routed_output,
    stacked_dots,
    straight_through,
)

OVERRIDDEN = ("dispatch", "combine")
"""What is overridden on the token dispatcher."""


class TorchtitanLayer:
    """One ``MoE`` and what is attached to it.

    Attributes:
        name: Its name in the model.
        block: The ``MoE``.
        config: The options.
        router_name: The router's name in the model.
    """

    def __init__(self, name: str, block: Any, config: DenseMixerConfig) -> None:
        self.name = name
        self.router_name = f"{name}.router" if name else "router"
        self.block = block
        self.config = config
        self._frozen_routers: FrozenRouters | None = None
        self._before: dict[str, Any] = {}
        self._hooks: list[RemovableHandle] = []
        self._scores: Tensor | None = None
        self._routed: tuple[Tensor, Tensor] | None = None
        self._checked = False
        self._comparison = Recurring()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    @property
    def router_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.block.router.parameters())

    @property
    def epsilon(self) -> float:
        """What torchtitan adds to the sum of the selected scores."""
        return 1e-20 if self.block.router.route_norm else 0.0

    def attach(self, frozen_routers: FrozenRouters) -> None:
        """Have the router trained through all experts. ``frozen_routers`` tells of them, for all layers."""
        self._frozen_routers = frozen_routers
        for name in OVERRIDDEN:
            if name in vars(self._dispatcher):
                self._before[name] = vars(self._dispatcher)[name]
            setattr(self._dispatcher, name, getattr(self, f"_{name}"))
        self._hooks = [
            self.block.router.register_forward_hook(self._after_router),
            self.block.register_forward_hook(self._after_block, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the layer as it was. Does nothing the second time."""
        for name in OVERRIDDEN:
            if getattr(vars(self._dispatcher).get(name), "__self__", None) is self:
                delattr(self._dispatcher, name)
                if name in self._before:
                    setattr(self._dispatcher, name, self._before[name])
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._forget()

    @property
    def _dispatcher(self) -> Any:
        return self.block.routed_experts.token_dispatcher

    def _host(self, name: str) -> Callable[..., Any]:
        """The method that we override, as it is now: others patch its class."""
        return self._before.get(name) or functools.partial(getattr(type(self._dispatcher), name), self._dispatcher)

    def _forget(self) -> None:
        self._scores = self._routed = None

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._forget()  # also where it has raised an error

    def _after_router(self, router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._forget()
        if torch.compiler.is_compiling():
            refuse_compiling(self.name)
        scores = output[2]
        if not torch.is_grad_enabled() or self.config.estimator == "conventional":
            return
        if self.router_is_frozen:
            assert self._frozen_routers is not None
            self._frozen_routers.warn_of(self)
            return
        if not scores.requires_grad:
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            refuse_capture(self.name)
        self._scores = scores

    def _dispatch(self, x: Tensor, weights: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``x`` is [tokens, hidden], ``weights`` and ``index`` are [tokens, k], all of this rank's tokens."""
        self._routed = weights, index
        return self._host("dispatch")(x, weights, index, *args, **kwargs)

    def _combine(self, routed_output: Tensor, metadata: Any, x: Tensor) -> Tensor:
        y: Tensor = self._host("combine")(routed_output, metadata, x)
        scores, routed = self._local_scores(), self._routed
        self._forget()
        if scores is None or routed is None:
            return y
        weights, index = routed
        # Out of sight of who records operations, as selective checkpointing, whose recomputation comes without.
        with torch.no_grad(), _disable_current_modes():
            if not self._checked:
                self._check(scores, index, weights)
            if self._comparison.due():
                self._compare(y, x, index, weights)
                self._comparison.made()
        return straight_through(
            y,
            scores,
            x=x,
            index=index,
            weights=weights,
            experts=self._dots,
            score=self.block.router.score_func,
            renormalised=self.block.router.route_norm,
            config=self.config,
            epsilon=self.epsilon,
        )

    def _local_scores(self) -> Tensor | None:
        """This rank's, [tokens, experts], whose gradient goes the way of that of the selected scores.

        With expert parallelism each rank has its own tokens. Without, a rank of tensor parallelism has a part of each
        expert, and so a part of the gradient.
        """
        scores = self._scores
        if scores is None:
            return None
        if isinstance(scores, DTensor):
            from torchtitan.protocols.sharding import resolve_placements

            layout = self.block.routed_experts._sharding_config.local_map.in_grad_placements[1]
            scores = scores.to_local(grad_placements=resolve_placements(layout, scores.device_mesh))
        return scores.flatten(0, -2).to(torch.promote_types(scores.dtype, torch.float32))

    def _check(self, scores: Tensor, index: Tensor, weights: Tensor) -> None:
        router = self.block.router
        try:
            self._checked = check_routing(scores, index, weights, router.route_norm, self.epsilon)
        except RoutingMismatchError as error:
            raise RoutingMismatchError(
                f"{self.name}: DenseMixer takes its router's scores to be the {router.score_func} of the logits, but "
                f"{error}. This version of torchtitan, or a patch of it, routes differently; the gradient would be "
                "wrong. Switch DenseMixer off."
            ) from None

    def _compare(self, y: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> None:
        """What the experts return with what their weights give, for a few tokens, see `transformers.checks`.

        Collective with expert parallelism: all ranks compare in the same forwards.
        """
        experts, spread = self._experts(x)
        evaluate = functools.partial(routed_output, experts=experts)
        if spread is not None:
            evaluate = functools.partial(spread.routed_output, experts=experts, rows=TOKENS)
        try:
            check_output(y, x, index, weights, evaluate, weights_of.COMPUTES_IN)
        except OutputMismatchError as error:
            raise OutputMismatchError(
                f"{self.name}.routed_experts: {error}. Something has replaced or patched the experts or their token "
                "dispatcher. DenseMixer computes with the experts' weights, so its gradient would be wrong. Undo that, "
                "or switch DenseMixer off."
            ) from None

    def _dots(self, x: Tensor, g: Tensor, known: Known | None) -> Tensor:
        """In the backward."""
        experts, spread = self._experts(x)
        dots = stacked_dots if spread is None else spread.dots
        selected, dtype = self.block.router.top_k, weights_of.COMPUTES_IN
        return dots(x, g, known, experts=experts, selected=selected, dtype=dtype, config=self.config)

    def _experts(self, x: Tensor) -> tuple[StackedExperts, Spread | None]:
        """With the weights as they are now: while the layer runs, and in its backward, FSDP has them together."""
        experts = weights_of.read_experts(self.block.routed_experts.inner_experts)
        held, count = len(experts.weights.down), self.block.router.num_experts
        mesh = getattr(self._dispatcher, "ep_mesh", None)
        ranks = 1 if mesh is None else mesh.size()
        hidden = experts.weights.down.shape[1]
        if held * ranks != count or hidden != x.shape[1]:  # FSDP shards by number, or by the dimension that follows
            raise RuntimeError(
                f"{self.name}: {ranks} ranks with {held} experts each, out of {count}, and {hidden} rows of a down "
                f"projection, out of {x.shape[1]}: some weights are sharded while DenseMixer needs them. Have FSDP "
                "wrap the layer or its block, not the experts alone."
            )
        if mesh is None:
            return experts, None
        first = mesh.get_local_rank() * held
        return experts, Spread(mesh.get_group(), range(first, first + held), count, shared=1)


def attached_layer(block: Any) -> TorchtitanLayer | None:
    """What is attached to a ``MoE``, if anything is."""
    owner = getattr(vars(block.routed_experts.token_dispatcher).get("combine"), "__self__", None)
    return owner if isinstance(owner, TorchtitanLayer) else None
