"""A small Mixture-of-Experts layer of Megatron Core under any layout: what it is made of, and what a step gives."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cpu
import torch
import torch.distributed as dist
from cases import BATCH, EXPERTS, FFN, HIDDEN, LATENT, SEQUENCE, Case, K
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts as experts_module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def weights(kind: str) -> Tensor:
    """The whole layer's, the same on every rank."""
    shapes = {
        "router": (EXPERTS, HIDDEN),
        "up": (EXPERTS, 2 * FFN, HIDDEN),
        "latent_up": (EXPERTS, 2 * FFN, LATENT),
        "up_not_gated": (EXPERTS, FFN, HIDDEN),
        "down": (EXPERTS, HIDDEN, FFN),
        "latent_down": (EXPERTS, LATENT, FFN),
        "to_latent": (LATENT, HIDDEN),
        "from_latent": (HIDDEN, LATENT),
    }
    generator = torch.Generator().manual_seed(list(shapes).index(kind))
    return 0.3 * torch.randn(shapes[kind], generator=generator)


def config(case: Case, dispatcher: str = "alltoall", **options: Any) -> TransformerConfig:
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": K,
            "moe_ffn_hidden_size": FFN,
            "ffn_hidden_size": FFN,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "use_cpu_initialization": True,
            "moe_token_dispatcher_type": dispatcher,
            "moe_router_load_balancing_type": "none",
            "tensor_model_parallel_size": tensor,
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
            "sequence_parallel": tensor > 1,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
            "params_dtype": case.dtype,
            "bf16": case.dtype == torch.bfloat16,
            **case.options,
            **options,
        }
    )


def build(case: Case, dispatcher: str = "alltoall", **options: Any) -> Any:
    """A layer with `weights`, or this rank's part of them."""
    settings = config(case, dispatcher, **options)
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    torch.manual_seed(0)  # for the weights of shared experts
    if case.experts != "SequentialMLP":
        _choose_experts(spec, case.experts)
    layer = build_module(spec, config=settings) if hasattr(spec, "module") else spec(config=settings)
    assert isinstance(layer, MoELayer)
    layer.set_layer_number(1)
    assert type(layer.experts).__name__ == case.experts
    with torch.no_grad():
        layer.router.weight.copy_(weights("router"))
        for parameter, value in experts_of(layer, *full_experts(settings)):
            parameter.copy_(value)
        if getattr(settings, "moe_latent_size", None):
            layer.fc1_latent_proj.weight.copy_(weights("to_latent"))
            layer.fc2_latent_proj.weight.copy_(weights("from_latent"))
        case.prepare(layer)
    return layer


def _choose_experts(spec: Any, name: str) -> None:
    kind = getattr(experts_module, name)
    submodules = None
    if name == "TEGroupedMLP":
        submodules = MLPSubmodules(linear_fc1=cpu.GroupedLinear, linear_fc2=cpu.GroupedLinear)
    if hasattr(spec, "submodules"):
        spec.submodules.experts = ModuleSpec(module=kind, submodules=submodules)
    else:  # 0.17 and later build without specs
        spec.keywords["submodules"].experts = functools.partial(kind, submodules=submodules)


def full_experts(settings: TransformerConfig) -> tuple[Tensor, Tensor]:
    """The weights of all experts, [experts, out, in] each."""
    if getattr(settings, "moe_latent_size", None):
        return weights("latent_up"), weights("latent_down")
    return weights("up" if settings.gated_linear_unit else "up_not_gated"), weights("down")


def experts_of(layer: Any, up: Tensor, down: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of this rank's experts, or its gradient, as a view [out, in], beside its part of the whole."""
    shards = parallel_state.get_expert_tensor_parallel_world_size()
    shard = parallel_state.get_expert_tensor_parallel_rank()
    halves = 2 if layer.config.gated_linear_unit else 1
    pairs = []
    for position, expert in enumerate(layer.local_expert_indices):
        # Gate and up projection are split each by itself.
        mine = torch.cat([half.chunk(shards)[shard] for half in up[expert].chunk(halves)])
        pairs.append((_matrix(layer.experts, 0, position), mine))
        pairs.append((_matrix(layer.experts, 1, position), down[expert].chunk(shards, 1)[shard]))
    return pairs


def _matrix(experts: Any, which: int, position: int) -> Tensor:
    """A parameter of an expert, [out, in]; in the place of its data, its gradient if it has one."""
    if hasattr(experts, "local_experts"):
        expert = experts.local_experts[position]
        parameter = (expert.linear_fc1, expert.linear_fc2)[which].weight
        return parameter if parameter.grad is None else parameter.grad
    if hasattr(experts, "linear_fc1"):
        parameter = getattr((experts.linear_fc1, experts.linear_fc2)[which], f"weight{position}")
        return parameter if parameter.grad is None else parameter.grad
    parameter = (experts.weight1, experts.weight2)[which]
    values = parameter if parameter.grad is None else parameter.grad
    held = experts.num_local_experts
    size = (held, values.shape[0], -1) if which == 0 else (held, -1, values.shape[1])
    return values.view(size)[position].t()


@dataclasses.dataclass
class Gradients:
    """Of one rank's tokens; of the experts, the sum over all ranks' tokens where it is the oracle's."""

    output: Tensor
    router: Tensor
    x: Tensor
    experts: list[Tensor]


def batch(case: Case, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A rank's x and g, [sequence, batch, hidden]; this one's by default."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(100 + rank)
    length = SEQUENCE + (2 * rank if case.uneven else 0)
    x, g = torch.randn(2, length, BATCH, HIDDEN, generator=generator).to(case.dtype)
    return x, g


def run(layer: Any, x: Tensor, g: Tensor) -> tuple[Gradients, Tensor]:
    """One forward and backward of Megatron; also the experts that it selected, [tokens, k]."""
    maps = []
    hook = layer.router.register_forward_hook(lambda router, args, output: maps.append(output[1]))
    x = x.clone().requires_grad_()
    output, _ = layer(x)
    output.backward(g)
    hook.remove()
    zeros = [torch.zeros_like(w) for w in full_experts(layer.config)]
    experts = [gradient.clone() for gradient, _ in experts_of(layer, *zeros)]
    index = maps[0].int().topk(layer.router.topk).indices
    return Gradients(output.detach(), layer.router.weight.grad.clone(), x.grad, experts), index
