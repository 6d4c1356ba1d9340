"""What can be done to experts in Megatron Core, so that they compute something else than their weights say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, EXPERTS, Case
from megatron.core import parallel_state
from moe_layer import batch, build
from torch import Tensor, nn
from torch.nn import functional as F

from densemixer_adapters.megatron import apply_densemixer
from densemixer_adapters.transformers.checks import OutputMismatchError

KINDS = {
    "SequentialMLP": Case(),
    "TEGroupedMLP": CASES["TEGroupedMLP"],
    "GroupedMLP": CASES["GroupedMLP"],
}
"""A case for each class of experts."""

Change = Callable[[Any], None]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def scale(output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return 0.5 * output[0], output[1]


def scaling_hook(layer: Any) -> None:
    layer.experts.register_forward_hook(lambda module, args, output: scale(output))


def hook_on_the_input(layer: Any) -> None:
    layer.experts.register_forward_pre_hook(lambda module, args: (0.5 * args[0], *args[1:]))


def patched_forward(layer: Any) -> None:
    forward = layer.experts.forward
    layer.experts.forward = lambda *args: scale(forward(*args))


def subclass(layer: Any) -> None:
    kind = type(layer.experts)
    scaled = {"forward": lambda *args: scale(kind.forward(*args))}
    layer.experts.__class__ = type(f"Scaled{kind.__name__}", (kind,), scaled)


def adapter_beside(layer: Any) -> None:
    """As adapters for experts are often written: on top of the original output, with the same input."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return output[0] + 0.5 * args[0] @ random(args[0].shape[1], args[0].shape[1]).to(args[0]), output[1]

    layer.experts.register_forward_hook(add)


def linears(layer: Any, name: str) -> list[Any]:
    """The modules of that name: one of all experts, or one of each."""
    return [getattr(owner, name) for owner in getattr(layer.experts, "local_experts", [layer.experts])]


def adapter_on_the_first_projection(layer: Any) -> None:
    """LoRA as a hook: the product of two matrices is added to the projection's own."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        x, y = args[0], output[0]
        return y + 0.3 * x @ random(x.shape[1], 4).to(x) @ random(4, y.shape[1]).to(x), output[1]

    for linear in linears(layer, "linear_fc1"):
        linear.register_forward_hook(add)


def one_expert(layer: Any) -> None:
    layer.experts.local_experts[-1].register_forward_hook(lambda module, args, output: scale(output))


def coarse_weights(layer: Any) -> None:
    """As a quantised layer that keeps its weights beside what it computes with."""

    def rounded(linear: Any) -> None:
        forward = linear.forward

        def coarse(*args: Any) -> Any:
            exact = [parameter.data for parameter in linear.parameters()]
            for parameter in linear.parameters():
                if parameter.numel():
                    step = parameter.data.abs().max() / 3
                    parameter.data = (parameter.data / step).round() * step
            try:
                return forward(*args)
            finally:
                for parameter, value in zip(linear.parameters(), exact, strict=True):
                    parameter.data = value

        linear.forward = coarse

    for name in ("linear_fc1", "linear_fc2"):
        for linear in linears(layer, name):
            rounded(linear)


def other_activation(layer: Any) -> None:
    """On the experts alone, where they don't share the layer's configuration."""
    if hasattr(layer.experts, "weight1"):
        layer.experts.activation_func = lambda both: F.relu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
        return
    for owner in getattr(layer.experts, "local_experts", [layer.experts]):
        owner.config = copy.copy(owner.config)
        owner.config.activation_func = F.relu


SHOWN = [scaling_hook, hook_on_the_input, patched_forward, subclass, adapter_beside]
"""What a look at hooks, forward and class of the experts tells."""
CHANGES: list[tuple[str, Change]] = [
    *((kind, change) for kind in KINDS for change in [*SHOWN, other_activation]),
    *((kind, adapter_on_the_first_projection) for kind in ("SequentialMLP", "TEGroupedMLP")),
    *((kind, coarse_weights) for kind in ("SequentialMLP", "TEGroupedMLP")),
    ("SequentialMLP", one_expert),
]
"""Classes of experts, each with what is done to them."""


def refusal(layer: Any, change: Change, case: Case) -> str | None:
    """What the first training forward after a change says; None if it has nothing against it."""
    change(layer)
    try:
        layer(batch(case)[0].requires_grad_())
    except OutputMismatchError as error:
        return str(error)
    return None


def attached(case: Case) -> Any:
    layer = build(case)
    apply_densemixer(layer)
    return layer


def refusals() -> dict[str, str | None]:
    """What this rank says of each change, which all ranks make."""
    parts = parallel_state.get_expert_tensor_parallel_world_size()  # which only SequentialMLP has here
    kinds = [kind for kind, case in KINDS.items() if case.exists and (parts == 1 or kind == "SequentialMLP")]
    return {
        f"{kind}, {change.__name__}": refusal(attached(KINDS[kind]), change, KINDS[kind])
        for kind, change in CHANGES
        if kind in kinds
    }


def one_alone() -> list[str | None]:
    """What this rank says where the first alone makes a change, and none waits for tokens of the others."""
    return [refusal(attached(Case()), scaling_hook if dist.get_rank() == 0 else nothing, Case())]


def without_tokens() -> list[str | None]:
    """What this rank says while the last half of the experts gets no tokens, and of a change when they do."""
    case = CASES["expert bias"]
    layer = attached(case)
    layer.router.expert_bias[EXPERTS // 2 :] = -100.0
    before = refusal(layer, nothing, case)
    layer.router.expert_bias.zero_()
    return [before, refusal(layer, nothing, case), refusal(layer, scaling_hook, case)]


def nothing(layer: Any) -> None:
    """No change."""
