"""One Mixture-of-Experts layer of Megatron Core with DenseMixer.

Routing, dispatch, experts and combination stay Megatron's own. In the backward, the layer's inputs x and the gradients
g of its outputs are gathered over the group that the experts are split over (expert and expert-tensor parallelism),
each rank evaluates its own experts, or its part of them, and the inner products are summed and scattered back to the
ranks that the tokens came from. Nothing but x, g and [tokens, experts] scalars travels. With a budget below 1 each rank
draws its share of the pairs that its own experts form with all of these tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from densemixer_adapters.layer import UnsupportedModelError
from densemixer_core import (
    DenseMixerConfig,
    ExpertLayout,
    ExpertWeights,
    RoutingMismatchError,
    StackedExperts,
    check_routing,
    expert_dots,
    router_scores,
    sampled_dots,
    straight_through,
)
from densemixer_core.routing import SCORE_FUNCTIONS
from densemixer_core.sampling import share_of_pairs

logger = logging.getLogger("densemixer")

OVERRIDDEN = ("routing", "dispatch_preprocess", "combine_postprocess")
"""What is overridden: the first on the router, the others on the token dispatcher, which sees what the experts see."""


_DROPS_TOKENS = ("drops tokens, so that an expert's output depends on the other tokens", "set it to None")
_IS_QUANTISED = ("has the experts compute with quantised weights, which DenseMixer doesn't read", "train in bf16")
_IS_CAPTURED = ("captures graphs, which lack what DenseMixer adds to the backward", "switch CUDA graphs off")
REFUSED = {
    "moe_expert_capacity_factor": _DROPS_TOKENS,
    "moe_expert_rank_capacity_factor": _DROPS_TOKENS,
    "moe_apply_probs_on_input": (
        "scales the experts' input by the score, so that the output isn't linear in the weights",
        "set it to False",
    ),
    "overlap_moe_expert_parallel_comm": ("cuts the layer into stages without a common graph", "set it to False"),
    "moe_mlp_glu_interleave_size": ("stores gate and up projection in another order than is read here", "unset it"),
    "fp8": _IS_QUANTISED,
    "fp4": _IS_QUANTISED,
    "enable_cuda_graph": _IS_CAPTURED,
    "external_cuda_graph": _IS_CAPTURED,
    "cuda_graph_impl": _IS_CAPTURED,
}
"""Options of Megatron Core that DenseMixer doesn't work with: what they do, and what to do instead."""


class MegatronLayer:
    """One ``MoELayer`` and the methods that are overridden on its router and its token dispatcher.

    Attributes:
        name: The layer's name in the model, or its number.
        block: The ``MoELayer``.
        frozen_was_said: Whether this process has been warned of a frozen router.
    """

    frozen_was_said: ClassVar[bool] = False

    def __init__(self, name: str, block: Any, config: DenseMixerConfig) -> None:
        if config.metrics:
            raise UnsupportedModelError(
                f"{name}: metrics=True doesn't work in Megatron Core: router metrics are for the HF Trainer and verl's "
                "FSDP engines. Drop the option."
            )
        if config.budget < 1 and (block.config.expert_tensor_parallel_size or 1) > 1:
            raise UnsupportedModelError(
                f"{name}: budget={config.budget} doesn't work with expert tensor parallelism: the ranks that share an "
                "expert would have to draw the same pairs. Set expert_tensor_parallel_size to 1, or the budget."
            )
        self.name = name
        self.block = block
        self._config = config
        self._owners = dict(
            zip(OVERRIDDEN, (block.router, block.token_dispatcher, block.token_dispatcher), strict=True)
        )
        self._before: dict[str, Any] = {}
        self._checked = False
        self._routed: tuple[Tensor, Tensor, Tensor] | None = None  # of the forward that is running
        self._x: Tensor | None = None

    @property
    def router(self) -> nn.Module:
        router: nn.Module = self.block.router
        return router

    @property
    def router_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.router.parameters())

    @property
    def renormalised(self) -> bool:
        config = self.block.config
        if config.moe_router_score_function == "softmax":
            return not config.moe_router_pre_softmax  # a softmax over the selected logits
        return bool(self.block.router.topk > 1)

    def attach(self) -> None:
        for name, owner in self._owners.items():
            if name in vars(owner):
                self._before[name] = vars(owner)[name]
            setattr(owner, name, getattr(self, f"_{name}"))

    def remove(self) -> None:
        """Leave the layer as it was. Does nothing the second time."""
        for name, owner in self._owners.items():
            if getattr(vars(owner).get(name), "__self__", None) is self:
                delattr(owner, name)
                if name in self._before:
                    setattr(owner, name, self._before[name])
        self._routed = self._x = None

    def _host(self, name: str) -> Callable[..., Any]:
        """The method that we override, as it is now: others patch its class."""
        owner = self._owners[name]
        return self._before.get(name) or functools.partial(getattr(type(owner), name), owner)

    def _routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        probs, routing_map = routed = self._host("routing")(logits, *args, **kwargs)
        self._routed = self._x = None
        if self._config.estimator == "conventional" or not (torch.is_grad_enabled() and logits.requires_grad):
            return routed
        if not self.is_selected():
            return routed
        if self.router_is_frozen:
            if not MegatronLayer.frozen_was_said:
                warn_of_frozen_routers([self])
            return routed
        scores = router_scores(logits.reshape(-1, logits.shape[-1]), self.block.config.moe_router_score_function)
        index = routing_map.to(torch.uint8).topk(self.block.router.topk, -1).indices
        weights = probs.detach().gather(-1, index)
        if not self._checked:
            self._check(scores, index, weights)
        self._routed = scores, index, weights
        return routed

    def _dispatch_preprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._routed is not None:
            self._x = hidden_states.detach()
        return self._host("dispatch_preprocess")(hidden_states, *args, **kwargs)

    def _combine_postprocess(self, *args: Any, **kwargs: Any) -> Any:
        output = self._host("combine_postprocess")(*args, **kwargs)
        routed, x = self._routed, self._x
        self._routed = self._x = None
        if routed is None or x is None:
            return output
        scores, index, weights = routed
        return straight_through(
            output,
            scores,
            x=x,
            index=index,
            weights=weights,
            experts=self._dots,
            score=self.block.config.moe_router_score_function,
            renormalised=self.renormalised,
            config=self._config,
        )

    def _dots(self, x: Tensor, g: Tensor, sensitivity: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """In the backward, with the weights as they are then."""
        return gathered_dots(
            x,
            g,
            sensitivity,
            experts=read_experts(self.block, self.name),
            indices=self.block.local_expert_indices,
            count=self.block.config.num_moe_experts,
            selected=self.block.router.topk,
            group=self.block.token_dispatcher.tp_ep_group,
            budget=self._config.budget,
            seed=self._config.seed,
            workspace_bytes=self._config.workspace_mb << 20,
        )

    def is_selected(self) -> bool:
        """Whether the option `layers` selects this one. Its number may not be known before the first forward."""
        if self._config.layers is None:
            return True
        numbers = moe_layer_numbers(self.block.config)
        chosen = [numbers[position] for position in self._config.positions(len(numbers))]
        return self.block.layer_number in chosen

    def _check(self, scores: Tensor, index: Tensor, weights: Tensor) -> None:
        try:
            check_routing(scores, index, weights, self.renormalised)
        except RoutingMismatchError as error:
            raise RoutingMismatchError(
                f"{self.name}: DenseMixer takes its router's scores to be the "
                f"{self.block.config.moe_router_score_function} of the logits, but {error}. This version of Megatron "
                "Core, or a patch of it, routes differently; the gradient would be wrong. Switch DenseMixer off."
            ) from None
        self._checked = weights.numel() > 0


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


def gathered_dots(
    x: Tensor,
    g: Tensor,
    sensitivity: Tensor | None,
    *,
    experts: Sequence[StackedExperts],
    indices: Sequence[int],
    count: int,
    selected: int,
    group: dist.ProcessGroup,
    budget: float,
    seed: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor | None]:
    """⟨g_t, E_j(x_t)⟩ for this rank's tokens and the experts of all ranks. Collective.

    Args:
        x: The experts' input, [tokens, hidden]. The ranks of the group may have different numbers of tokens.
        g: The gradient of the experts' output, [tokens, hidden].
        sensitivity: As in `densemixer_core.sampled_dots`, [tokens, experts]; None for a budget of 1.
        experts: This rank's experts, or its part of them: their inner products are summed over the group.
        indices: Their positions among all experts.
        count: The number of all experts.
        selected: How many of them a token goes through.
        group: The ranks that the experts are split over.
        budget, seed: As in `densemixer_core.DenseMixerConfig`.
        workspace_bytes: Upper bound on temporaries: half of it for what is gathered, half for the
            experts; all of it for these on a single rank.

    Returns:
        [tokens, experts], float32 or float64; with sensitivities, the factors too.
    """
    ranks, held = dist.get_world_size(group), slice(indices[0], indices[-1] + 1)
    own = workspace_bytes if ranks == 1 else workspace_bytes // 2  # the experts' share

    def evaluate(x: Tensor, g: Tensor, sensitivity: Tensor | None, tokens: int) -> tuple[Tensor, ...]:
        if sensitivity is None:
            return (torch.cat([expert_dots(x, g, some, workspace_bytes=own) for some in experts], 1),)
        drawn = share_of_pairs(tokens * (count - selected) * len(indices) // count, budget)
        return sampled_dots(x, g, sensitivity[:, held], drawn, seed, _stack(experts), workspace_bytes=own)

    if ranks == 1:
        return _with_factors(evaluate(x, g, sensitivity, len(x)))
    gathered = torch.empty(ranks, dtype=torch.int64, device=x.device)
    dist.all_gather_into_tensor(gathered, gathered.new_tensor([len(x)]), group=group)
    lengths: list[int] = gathered.tolist()
    longest = max(lengths)
    numbers = 2 if sensitivity is None else 5  # of 4 bytes for a token and an expert: gathered, and what we add to
    step = max(1, min(longest, own // (ranks * (2 * x.shape[1] * x.element_size() + numbers * count * 4))))
    parts = []
    for start in range(0, max(1, longest), step):
        all_x, all_g = (_all_gather(tensor[start : start + step], step, group) for tensor in (x, g))
        all_sensitivity = None if sensitivity is None else _all_gather(sensitivity[start : start + step], step, group)
        tokens = sum(min(max(length - start, 0), step) for length in lengths)  # without those that fill up
        parts.append(
            [_scatter(ours, held, step, count, group) for ours in evaluate(all_x, all_g, all_sensitivity, tokens)]
        )
    return _with_factors([torch.cat(results)[: len(x)] for results in zip(*parts, strict=True)])


def _with_factors(results: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return results[0], results[1] if len(results) > 1 else None


def _scatter(ours: Tensor, held: slice, rows: int, count: int, group: dist.ProcessGroup) -> Tensor:
    """From numbers for the tokens of all ranks and our experts to those for our tokens, ``rows``, and all experts."""
    whole = ours.new_zeros(len(ours), count)
    whole[:, held] = ours
    scattered = ours.new_empty(rows, count)
    dist.reduce_scatter_tensor(scattered, whole, group=group)
    return scattered


def _stack(experts: Sequence[StackedExperts]) -> StackedExperts:
    """All of them as one. Weights that lie apart are copied."""
    if len(experts) == 1:
        return experts[0]
    up, down, *biases = zip(*(some.weights for some in experts), strict=True)
    up_bias, down_bias = (None if bias[0] is None else torch.cat(bias) for bias in biases[:2])
    return StackedExperts(ExpertWeights(torch.cat(up), torch.cat(down), up_bias, down_bias), experts[0].layout)


def _all_gather(rows: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, each filled up with zeros to ``count`` rows."""
    full = F.pad(rows, (0, 0, 0, count - rows.shape[0])).contiguous()
    gathered = full.new_empty(dist.get_world_size(group) * count, full.shape[1])
    dist.all_gather_into_tensor(gathered, full, group=group)
    return gathered


def read_experts(block: Any, name: str) -> list[StackedExperts]:
    """The experts of this rank, as views of their weights, in their order.

    Raises:
        UnsupportedModelError: They are of an unknown kind, or their weights are somewhere else than Megatron has them.
    """
    experts = block.experts
    layout = ExpertLayout(_activation(block.config))
    try:
        if hasattr(experts, "weight1"):  # GroupedMLP, all experts in one matrix
            up, down = experts.weight1, experts.weight2
            held = block.num_local_experts
            stacked = ExpertWeights(up.view(held, up.shape[0], -1), down.view(held, -1, down.shape[1]))
            return [StackedExperts(stacked, ExpertLayout(layout.activation, transposed=True))]
        return [StackedExperts(weights, layout) for weights in _separate_weights(experts, block.num_local_experts)]
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name}: DenseMixer can't read the weights of its experts ({type(experts).__name__}: {error}). It knows "
            "SequentialMLP, TEGroupedMLP and GroupedMLP without adapters on the experts (LoRA on attention works). "
            "Leave the experts as Megatron builds them, or switch DenseMixer off."
        ) from None


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


def moe_layer_numbers(config: Any) -> list[int]:
    """The numbers, from 1, of the model's layers that have experts: over all pipeline stages.

    Raises:
        ValueError: They don't follow from the configuration.
    """
    if getattr(config, "mtp_num_layers", None) or getattr(config, "is_hybrid_model", False):
        raise ValueError(
            "layers: the positions of the Mixture-of-Experts layers of a model with multi-token prediction, or of a "
            "hybrid one, are not known. Leave `layers` out."
        )
    frequency, layers = config.moe_layer_freq, range(config.num_layers)
    pattern = [layer % frequency == 0 for layer in layers] if isinstance(frequency, int) else frequency
    return [layer + 1 for layer in layers if pattern[layer]]


def refuse(name: str, block: Any) -> None:
    """Raise if DenseMixer can't train this layer.

    Raises:
        UnsupportedModelError: The message names the layer, the reason and the fix.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    config = block.config
    balancing = config.moe_router_load_balancing_type
    score = config.moe_router_score_function
    reason = fix = ""
    for option, (why, remedy) in REFUSED.items():
        if getattr(config, option, None) not in (None, False, "none"):
            reason, fix = f"{option} {why}", remedy
    if "sinkhorn" in (balancing if isinstance(balancing, list) else [balancing]):
        reason = "moe_router_load_balancing_type sinkhorn selects experts that don't follow from the scores"
        fix = "use another type"
    if config.add_bias_linear and (config.expert_tensor_parallel_size or 1) > 1:
        reason = "add_bias_linear with expert tensor parallelism has not been tested; ranks may hold the same bias"
        fix = "set one of the two off"
    if score not in SCORE_FUNCTIONS:
        reason = f"its moe_router_score_function {score} is unknown"
        fix = f"use one of {', '.join(SCORE_FUNCTIONS)}"
    if not isinstance(block.router, TopKRouter):
        reason = f"its router is a {type(block.router).__name__}, not Megatron's TopKRouter"
        fix = "build it with that one"
    if reason:
        raise UnsupportedModelError(
            f"{name}: DenseMixer can't train it: {reason}. Either {fix}, or switch DenseMixer off."
        )
    read_experts(block, name)
