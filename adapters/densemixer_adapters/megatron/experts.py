"""The experts of a ``MoELayer``: where its weights are, and how to compute with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_core import ExpertLayout, ExpertWeights, StackedExperts


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
        weights = [_own_weight(owner, f"weight{suffix}") for owner in owners]
        biases = [getattr(owner, f"bias{suffix}", None) for owner in owners]
        yield ExpertWeights(
            *(weight.unsqueeze(0) for weight in weights),
            # Transformer Engine has an empty tensor for no bias.
            *(None if bias is None or bias.numel() == 0 else bias.unsqueeze(0) for bias in biases),
        )


def _own_weight(linear: nn.Module, name: str) -> Tensor:
    """Not that of a module which it is wrapped around, as an adapter is that shows it as its own."""
    if name not in linear._parameters and not is_parametrized(linear, name):
        raise AttributeError(f"{type(linear).__name__} has no parameter {name} of its own")
    weight: Tensor = getattr(linear, name)
    return weight


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
