"""One Mixture-of-Experts layer of Megatron Core with DenseMixer.

Routing, dispatch, experts and combination stay Megatron's own. In the backward, `expert_parallel` evaluates the layer's
experts over the group that they are split over (expert and expert-tensor parallelism).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.expert_parallel import gathered_dots
from densemixer_adapters.megatron.positions import Selection
from densemixer_adapters.megatron.refuse import refuse_router
from densemixer_adapters.metrics.layer_meter import LayerMeter
from densemixer_adapters.observer import Forward, Observer
from densemixer_core import (
    DenseMixerConfig,
    ExpertLayout,
    ExpertWeights,
    Known,
    RoutingMismatchError,
    StackedExperts,
    check_routing,
    router_scores,
    straight_through,
)

logger = logging.getLogger("densemixer")

OVERRIDDEN = ("routing", "dispatch_preprocess", "combine_postprocess")
"""What is overridden: the first on the router, the others on the token dispatcher, which sees what the experts see."""
OBSERVED = "gating"
"""What is overridden on the router besides, for router metrics: it sees the router's input."""

watched: weakref.WeakValueDictionary[int, MegatronLayer] = weakref.WeakValueDictionary()
"""The layers of this process that have meters, in the order in which they first ran, which is that of all ranks."""
_order = itertools.count()


@dataclasses.dataclass
class _Running:
    """A training forward of a layer, between two of its overridden methods.

    Attributes:
        router_input: The router's input, [sequence, batch, hidden], for router metrics.
        logits: What came of it, [sequence, batch, experts].
        scores: p of all experts, [tokens, experts]; None if DenseMixer adds nothing.
        index, weights: The selected experts and their weights, [tokens, k] each.
        x: The experts' input, [..., hidden], once it is known.
    """

    router_input: Tensor | None
    logits: Tensor
    scores: Tensor | None
    index: Tensor
    weights: Tensor
    x: Tensor | None = None


class MegatronLayer:
    """One ``MoELayer`` and the methods that are overridden on its router and its token dispatcher.

    Attributes:
        block: The ``MoELayer``.
        config: The options.
        frozen_was_said: Whether this process has been warned of a frozen router.
        meter: What measures router metrics, from the first training forward on; None without the option ``metrics``.
        ran: Whether there was a training forward since the meter was read.
        observer: Who is told of each training forward, if anybody.
        loss_scale: What a gradient scaler multiplied the last forward's loss by, a tensor of one element; None for 1.

    Args:
        block: The ``MoELayer``.
        config: The options.
        selection: Which layers the option ``layers`` selects.
        path: The block's name in this rank's part of the model, if it is known.
    """

    frozen_was_said: ClassVar[bool] = False

    def __init__(self, block: Any, config: DenseMixerConfig, selection: Selection, path: str = "") -> None:
        self.block = block
        self.config = config
        self._selection = selection
        self._path = path
        self._owners = dict(
            zip(OVERRIDDEN, (block.router, block.token_dispatcher, block.token_dispatcher), strict=True)
        )
        if config.metrics:
            self._owners[OBSERVED] = block.router
        self._before: dict[str, Any] = {}
        self._block_checked = False
        self._checked = False
        self._leaving: list[RemovableHandle] = []
        self._router_input: Tensor | None = None
        self._running: _Running | None = None
        self._pairs_left_out: Tensor | None = None
        self.meter: LayerMeter | None = None
        self.ran = False
        self.observer: Observer | None = None
        self.loss_scale: Tensor | None = None

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

    def check_block(self) -> None:
        """Raise if this layer is built of what DenseMixer doesn't know.

        Raises:
            UnsupportedModelError: The message names the layer, the reason and the fix.
        """
        refuse_router(self.name, self.router)
        read_experts(self.block, self.name)
        self._block_checked = True

    @property
    def epsilon(self) -> float:
        """What Megatron adds to the sum of the selected scores; a softmax over the selected logits needs nothing."""
        return 1e-20 if self.renormalised and self.block.config.moe_router_score_function != "softmax" else 0.0

    def attach(self) -> None:
        for name, owner in self._owners.items():
            if name in vars(owner):
                self._before[name] = vars(owner)[name]
            setattr(owner, name, getattr(self, f"_{name}"))
        # A recomputation doesn't call the block, only what is in it.
        self._leaving = [
            self.block.register_forward_hook(self._after_block, always_call=True),
            self.block.experts.register_forward_hook(self._after_experts, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the layer as it was. Does nothing the second time."""
        for name, owner in self._owners.items():
            if getattr(vars(owner).get(name), "__self__", None) is self:
                delattr(owner, name)
                if name in self._before:
                    setattr(owner, name, self._before[name])
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
        self._router_input = self._running = None

    def _host(self, name: str) -> Callable[..., Any]:
        """The method that we override, as it is now: others patch its class."""
        owner = self._owners[name]
        return self._before.get(name) or functools.partial(getattr(type(owner), name), owner)

    def _gating(self, router_input: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._router_input = router_input.detach() if torch.is_grad_enabled() else None
        return self._host("gating")(router_input, *args, **kwargs)

    def _routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        router_input = self._router_input
        self._forget()
        probs, routing_map = routed = self._host("routing")(logits, *args, **kwargs)
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return routed
        teaches = self.config.estimator != "conventional"
        if not (teaches or self.config.metrics) or not self.is_selected():
            return routed
        if self.config.metrics:
            self.ran = True
            if self.meter is None:
                self.meter = LayerMeter(self, load=True)
                watched[next(_order)] = self
        if self.router_is_frozen:
            if not MegatronLayer.frozen_was_said:
                warn_of_frozen_routers([self])
            return routed
        index = routing_map.to(torch.uint8).topk(self.block.router.topk, -1).indices
        weights = probs.detach().gather(-1, index)
        scores = None
        if teaches:
            scores = router_scores(logits.reshape(-1, logits.shape[-1]), self.score)
            if not self._checked:
                self._check(scores, index, weights)
        self._running = _Running(router_input, logits, scores, index, weights)
        return routed

    def _dispatch_preprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._block_checked:
            self.check_block()
        if self._running is not None:
            self._running.x = hidden_states.detach()
        return self._host("dispatch_preprocess")(hidden_states, *args, **kwargs)

    def _combine_postprocess(self, *args: Any, **kwargs: Any) -> Any:
        running = self._running
        self._forget()
        if running is None or running.x is None:
            return self._host("combine_postprocess")(*args, **kwargs)
        with _shared_experts_apart(self.block.token_dispatcher) as shared:
            output = self._host("combine_postprocess")(*args, **kwargs)
        scores = running.scores
        if self.observer is not None:
            self.loss_scale = _loss_scale(self.block.config, output.device)
            forward = Forward(running.router_input, running.logits, False, running.x, running.index)
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
        self._pairs_left_out = count if self._pairs_left_out is None else self._pairs_left_out + count

    def experts_written_to(self) -> None:
        """Not called by the core: the experts are read in the backward alone."""

    def take_pairs_left_out(self) -> Tensor | None:
        """How many pairs overflowed in float16 since this was last called, a scalar; None if nothing was counted."""
        count, self._pairs_left_out = self._pairs_left_out, None
        return count

    def is_selected(self) -> bool:
        """Whether the option `layers` selects this one. Its number may not be known before the first forward."""
        return self._selection.chooses(self.block.layer_number)

    def _check(self, scores: Tensor, index: Tensor, weights: Tensor) -> None:
        try:
            self._checked = check_routing(scores, index, weights, self.renormalised, self.epsilon)
        except RoutingMismatchError as error:
            raise RoutingMismatchError(
                f"{self.name}: DenseMixer takes its router's scores to be the "
                f"{self.score} of the logits, but {error}. This version of Megatron "
                "Core, or a patch of it, routes differently; the gradient would be wrong. Switch DenseMixer off."
            ) from None


def _loss_scale(config: Any, device: torch.device) -> Tensor | None:
    """What Megatron multiplies the loss by now, for half precision."""
    scale = config.grad_scale_func
    return None if scale is None else scale(torch.ones(1, device=device))


@contextlib.contextmanager
def _shared_experts_apart(dispatcher: Any) -> Iterator[list[Tensor]]:
    """Have the dispatcher add nothing where it adds the output of overlapped shared experts, which is listed instead.

    What is added is −0, which leaves every bit of the routed experts' output, +0 and −0 included, as it is.
    """
    apart: list[Tensor] = []
    experts = getattr(dispatcher, "shared_experts", None)
    if experts is None:
        yield apart
        return

    def get_output() -> Tensor:
        apart.append(type(experts).get_output(experts))
        return torch.tensor(-0.0, dtype=apart[0].dtype, device=apart[0].device)

    experts.get_output = get_output
    try:
        yield apart
    finally:
        del experts.get_output


def warn_of_frozen_routers(layers: Sequence[MegatronLayer]) -> None:
    """Log one warning for all of these layers, if there are any."""
    if layers:
        MegatronLayer.frozen_was_said = True
        logger.warning(
            "DenseMixer has nothing to train where the router is frozen: %s.router%s. Such a layer trains as without "
            "DenseMixer. Call requires_grad_(True) on the router after whatever froze it, e.g. a LoRA transform.",
            layers[0].name,
            f" and {len(layers) - 1} more" if len(layers) > 1 else "",
        )


def read_experts(block: Any, name: str) -> list[StackedExperts]:
    """The experts of this rank, as views of their weights, in their order.

    Raises:
        UnsupportedModelError: They are of an unknown kind, or their weights are somewhere else than Megatron has them.
    """
    experts, config = block.experts, block.config
    layout = ExpertLayout(_activation(config))
    try:
        if hasattr(experts, "weight1"):  # GroupedMLP, all experts in one matrix
            up, down = experts.weight1, experts.weight2
            held = block.num_local_experts
            stacked = ExpertWeights(up.view(held, up.shape[0], -1), down.view(held, -1, down.shape[1]))
            return [StackedExperts(stacked, ExpertLayout(layout.activation, transposed=True))]
        separate = list(_separate_weights(experts, block.num_local_experts))
    except AttributeError as error:
        raise _unreadable(name, experts, str(error)) from None
    if config.add_bias_linear and any(one.up_bias is None or one.down_bias is None for one in separate):
        raise _unreadable(name, experts, "no biases, although add_bias_linear is on")
    return [StackedExperts(weights, layout) for weights in separate]


def _unreadable(name: str, experts: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: DenseMixer can't read the weights of its experts ({type(experts).__name__}: {why}). It knows "
        "SequentialMLP, TEGroupedMLP and GroupedMLP without adapters on the experts (LoRA on attention works). "
        "Leave the experts as Megatron builds them, or switch DenseMixer off."
    )


def _separate_weights(experts: Any, count: int) -> Iterator[ExpertWeights]:
    for position in range(count):
        if hasattr(experts, "local_experts"):  # SequentialMLP
            expert = experts.local_experts[position]
            owners, suffix = (expert.linear_fc1, expert.linear_fc2), ""
        else:  # TEGroupedMLP
            owners, suffix = (experts.linear_fc1, experts.linear_fc2), str(position)
        weights = [getattr(owner, f"weight{suffix}") for owner in owners]
        biases = [getattr(owner, f"bias{suffix}", None) for owner in owners]
        yield ExpertWeights(
            *(weight.unsqueeze(0) for weight in weights),
            # Transformer Engine has an empty tensor for no bias.
            *(None if bias is None or bias.numel() == 0 else bias.unsqueeze(0) for bias in biases),
        )


def _activation(config: Any) -> Callable[[Tensor], Tensor]:
    activation = config.activation_func
    if not config.gated_linear_unit:
        return activation  # type: ignore[no-any-return]
    clamp = getattr(config, "activation_func_clamp_value", None)
    offset = getattr(config, "glu_linear_offset", 0.0)

    def gated(both: Tensor) -> Tensor:
        gate, linear = both.chunk(2, -1)
        if clamp is not None:
            gate, linear = gate.clamp(max=clamp), linear.clamp(-clamp, clamp)
        return activation(gate) * (linear + offset)  # type: ignore[no-any-return]

    return gated


def attached_layer(router: nn.Module) -> MegatronLayer | None:
    """The layer that is attached to a router now."""
    layer = getattr(vars(router).get(OVERRIDDEN[0]), "__self__", None)
    return layer if isinstance(layer, MegatronLayer) else None
