"""How the router of a ``MoELayer`` of Megatron Core is trained through all of its experts.

Routing, dispatch, experts and combination stay Megatron's own. In the backward, `expert_parallel` evaluates the layer's
experts over the group that they are split over (expert and expert-tensor parallelism).
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from densemixer_adapters.expert_parallel import gathered_dots
from densemixer_adapters.megatron.announce import warn_of_frozen_router
from densemixer_adapters.megatron.experts import read_experts
from densemixer_adapters.megatron.experts_check import ExpertsCheck
from densemixer_adapters.megatron.host_layer import HostLayer
from densemixer_adapters.megatron.overrides import Overrides
from densemixer_adapters.megatron.positions import Selection
from densemixer_adapters.megatron.refuse import check_scores, refuse_router
from densemixer_adapters.megatron.running import Running, selection
from densemixer_adapters.megatron.shared_experts import shared_experts_apart
from densemixer_adapters.metrics.layer_meter import LayerMeter
from densemixer_adapters.observer import Forward, Observer, PairsLeftOut
from densemixer_adapters.transformers.checks import Recurring
from densemixer_core import DenseMixerConfig, Known, router_scores, straight_through

OVERRIDDEN = ("routing", "dispatch_preprocess", "combine_postprocess")
"""What is overridden: the first on the router, for its logits; the others on the token dispatcher, which sees what is
selected, with which weights, and what the experts see."""
OBSERVED = "gating"
"""What is overridden on the router besides, for router metrics: it sees the router's input."""

watched: weakref.WeakValueDictionary[int, MegatronLayer] = weakref.WeakValueDictionary()
"""The layers of this process that have meters, in the order in which they first ran, which is that of all ranks."""
_order = itertools.count()


class MegatronLayer(HostLayer):
    """One ``MoELayer`` and the methods that are overridden on its router and its token dispatcher.

    Args:
        block, path: As in `HostLayer`.
        config: The options.
        selection: Which layers the option ``layers`` selects.

    Attributes:
        config: As given.
        meter: What measures router metrics, from the first training forward on; None without the option ``metrics``.
        ran: Whether there was a training forward since the meter was read.
        observer: Who is told of each training forward, if anybody.
        loss_scale: What a gradient scaler multiplied the last forward's loss by, a tensor of one element; None for 1.
    """

    def __init__(self, block: Any, config: DenseMixerConfig, selection: Selection, path: str = "") -> None:
        super().__init__(block, path)
        self.config = config
        self._selection = selection
        owners = (block.router, block.token_dispatcher, block.token_dispatcher)
        observed = {OBSERVED: block.router} if config.metrics else {}
        self._overrides = Overrides(dict(zip(OVERRIDDEN, owners, strict=True)) | observed)
        self._overriding = (*OVERRIDDEN, *observed)
        self._block_checked = False
        self._scores_check = Recurring()
        self._experts_check = ExpertsCheck(self)
        self._leaving: list[RemovableHandle] = []
        self._router_input: Tensor | None = None
        self._logits: Tensor | None = None
        self._running: Running | None = None
        self._left_out = PairsLeftOut()
        self.meter: LayerMeter | None = None
        self.ran = False
        self.observer: Observer | None = None
        self.loss_scale: Tensor | None = None

    def is_selected(self) -> bool:
        """Whether the option `layers` selects this one. Its number may not be known before the first forward."""
        return self._selection.chooses(self.block.layer_number)

    def check_block(self) -> None:
        """Raise if this layer is built of what DenseMixer doesn't know.

        Raises:
            UnsupportedModelError: The message names the layer, the reason and the fix.
        """
        refuse_router(self.name, self.router)
        read_experts(self.block, self.name)
        self._block_checked = True

    def attach(self) -> None:
        self._overrides.put({name: getattr(self, f"_{name}") for name in self._overriding})
        self._experts_check.attach()
        # A recomputation doesn't call the block, only what is in it.
        self._leaving = [
            self.block.register_forward_hook(self._after_block, always_call=True),
            self.block.experts.register_forward_hook(self._after_experts, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the layer as it was. Does nothing the second time."""
        self._overrides.undo()
        self._experts_check.remove()
        for hook in self._leaving:
            hook.remove()
        self.meter = self.observer = None
        self._forget()

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._forget()

    def _after_experts(self, experts: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if output is None:  # they have raised an error
            self._forget()

    def _forget(self) -> None:
        self._router_input = self._logits = self._running = None
        self._experts_check.forget()

    # What happens in a forward, in this order.

    def _gating(self, router_input: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._router_input = router_input.detach() if torch.is_grad_enabled() else None
        return self._overrides.host("gating")(router_input, *args, **kwargs)

    def _routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        router_input = self._router_input
        self._forget()
        routed = self._overrides.host("routing")(logits, *args, **kwargs)
        if torch.is_grad_enabled() and self._trains() and logits.requires_grad:
            self._router_input, self._logits = router_input, logits
        return routed

    def _trains(self) -> bool:
        """Whether there is anything to do in a training forward."""
        if (self.config.estimator == "conventional" and not self.config.metrics) or not self.is_selected():
            return False
        if self.config.metrics:
            self.ran = True
            if self.meter is None:
                self.meter = LayerMeter(self, load=True)
                watched[next(_order)] = self
        if self.router_is_frozen:
            warn_of_frozen_router(self)
            return False
        return True

    def _scores(self, logits: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """Those of all experts; compared with what Megatron made of the logits, now and then."""
        if self.config.estimator == "conventional":
            return None
        scores = router_scores(logits.reshape(-1, logits.shape[-1]), self.score)
        if self._scores_check.due():
            # Out of sight of who records operations, as selective checkpointing, whose recomputation comes without.
            with torch.no_grad(), _disable_current_modes():
                told = check_scores(self, scores, index, weights)
            if told:
                self._scores_check.made()
        return scores

    def _dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        if not self._block_checked:
            self.check_block()
        router_input, logits = self._router_input, self._logits
        self._forget()
        if logits is not None:
            index, weights = selection(routing_map, probs, self.block.router.topk)
            scores = self._scores(logits, index, weights)
            self._running = Running(router_input, logits, scores, index, weights, hidden_states.detach())
            if scores is not None:
                self._experts_check.begin()
        return self._overrides.host("dispatch_preprocess")(hidden_states, routing_map, probs)

    def _combine_postprocess(self, *args: Any, **kwargs: Any) -> Any:
        running = self._running
        self._forget()
        if running is None:
            return self._overrides.host("combine_postprocess")(*args, **kwargs)
        with shared_experts_apart(self.block.token_dispatcher) as shared:
            output = self._overrides.host("combine_postprocess")(*args, **kwargs)
        scores = running.scores
        if self.observer is not None:
            scale = self.block.config.grad_scale_func  # what Megatron multiplies the loss by now, for half precision
            self.loss_scale = None if scale is None else scale(torch.ones(1, device=output.device))
            forward = Forward(running.router_input, running.logits, False, running.x, running.index, running.weights)
            output, scores = self.observer(forward, output, scores)
        if scores is not None:
            output = straight_through(
                output,
                scores,
                x=running.x,
                index=running.index,
                weights=running.weights,
                experts=self._dots,
                score=self.score,
                renormalised=self.renormalised,
                config=self.config,
                epsilon=self.epsilon,
                listener=self,
            )
        return output + shared[0].view_as(output) if shared else output

    # What happens in the backward.

    def _dots(self, x: Tensor, g: Tensor, known: Known | None) -> Tensor:
        """In the backward, with the weights as they are then."""
        return gathered_dots(
            x,
            g,
            known,
            experts=read_experts(self.block, self.name),
            indices=self.block.local_expert_indices,
            count=self.block.config.num_moe_experts,
            selected=self.block.router.topk,
            group=self.block.token_dispatcher.tp_ep_group,
            budget=self.config.budget,
            seed=self.config.seed,
            workspace_bytes=self.config.workspace_mb << 20,
        )

    def pairs_left_out(self, count: Tensor) -> None:
        """Called by the core in float16."""
        self._left_out.add(count)

    def experts_written_to(self) -> None:
        """Not called by the core: the experts are read in the backward alone."""

    def take_pairs_left_out(self) -> Tensor | None:
        """How many pairs overflowed in float16 since this was last called, a scalar; None if nothing was counted."""
        return self._left_out.take()


def attached_layer(router: nn.Module) -> MegatronLayer | None:
    """The layer that is attached to a router now."""
    layer = getattr(vars(router).get(OVERRIDDEN[0]), "__self__", None)
    return layer if isinstance(layer, MegatronLayer) else None
