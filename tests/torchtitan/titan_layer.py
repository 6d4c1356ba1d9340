"""One Mixture-of-Experts layer of torchtitan in float64, beside the oracle."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import oracle
import torch
import without_gpu  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, GptOssMoE

HIDDEN, FFN, EXPERTS, K = 16, 24, 8, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """What torchtitan's models set.

    Args:
        bias: Whether a bias without a gradient takes part in the selection.
        groups: In how many groups of experts the selection is made.
    """

    score: str = "softmax"
    renormalised: bool = True
    scaling: float = 1.0
    bias: bool = False
    groups: int | None = None
    shared: bool = False
    gpt_oss: bool = False
    k: int = K


CASES = {
    "Qwen3": Case(),
    "softmax, as it is": Case(renormalised=False),
    "DeepSeek-V3": Case("sigmoid", scaling=2.5, bias=True, groups=4, shared=True),
    "sigmoid, as it is": Case("sigmoid", renormalised=False, bias=True),
    "gpt-oss": Case(gpt_oss=True),
    "one expert": Case("sigmoid", renormalised=False, k=1),
}


class Float64(oracle.Float64):
    """torchtitan's experts go to bfloat16; here they don't, and torch's grouped product has no float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0]
        if func is torch._grouped_mm:
            rows, matrices, ends = *args, kwargs["offs"]
            parts = torch.split(rows, ends.diff(prepend=ends.new_zeros(1)).tolist())
            return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
        return super().__torch_function__(func, types, args, kwargs)


def config_of(case: Case) -> Any:
    """The configuration of a ``MoE``."""
    normal = functools.partial(nn.init.normal_, std=0.3)
    init = {"weight": nn.init.normal_, "bias": normal}
    weights = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), normal)
    routed = make_routed_experts_config(
        dim=HIDDEN, hidden_dim=FFN, num_experts=EXPERTS, top_k=case.k, param_init=weights, comm_backend="standard"
    )
    config = make_moe_config(
        num_experts=EXPERTS,
        load_balance_coeff=1e-3 if case.bias else None,
        router=make_router_config(
            dim=HIDDEN,
            num_experts=EXPERTS,
            gate_param_init=init,
            top_k=case.k,
            score_func=case.score,  # type: ignore[arg-type]
            route_norm=case.renormalised,
            route_scale=case.scaling,
            num_expert_groups=case.groups,
            num_limited_groups=case.groups and 2,
            bias=case.gpt_oss,
        ),
        routed_experts=routed,
        shared_experts=make_ffn_config(dim=HIDDEN, hidden_dim=FFN, w1_param_init=init, w2w3_param_init=init)
        if case.shared
        else None,
    )
    if not case.gpt_oss:
        return config
    names = ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
    routed.inner_experts = GptOssGroupedExperts.Config(
        dim=HIDDEN, hidden_dim=FFN, num_experts=EXPERTS, param_init=dict.fromkeys(names, normal), swiglu_limit=0.5
    )
    assert isinstance(routed.token_dispatcher, AllToAllTokenDispatcher.Config)
    return GptOssMoE.Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def build(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """A ``MoE`` that trains."""
    torch.manual_seed(0)
    moe = config_of(case).build()
    with torch.no_grad():
        moe.init_states()
        moe = moe.to(dtype).train()
        if case.bias:
            moe.expert_bias_E.normal_(std=0.3)
    return moe


def batch(dtype: torch.dtype = torch.float64, tokens: int = 12) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output, [2, tokens/2, hidden] each."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(2, tokens // 2, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype).requires_grad_(), g.to(dtype)


@dataclasses.dataclass
class Found:
    """An output and all gradients, that of x included; and the experts that were selected, [tokens, k]."""

    output: Tensor
    gradients: dict[str, Tensor]
    index: Tensor


def train(moe: Any, x: Tensor, g: Tensor) -> Found:
    """A forward and a backward in float64."""
    seen: list[Tensor] = []
    spy = moe.router.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    x = x.detach().requires_grad_()
    moe.zero_grad()
    with Float64():
        output = moe(x)
        output.backward(gradient=g)
    spy.remove()
    gradients = {
        name: parameter.grad.clone() for name, parameter in moe.named_parameters() if parameter.grad is not None
    }
    assert x.grad is not None
    return Found(output.detach(), {**gradients, "x": x.grad}, seen[0].flatten(0, -2))


def expert_of(moe: Any, parameters: dict[str, Tensor], j: int) -> Any:
    """E_j as the papers have it, from parameters in float64."""
    p = {name.rpartition(".")[2]: value[j] for name, value in parameters.items() if "inner_experts" in name}
    if "w1_EFD" in p:
        return oracle.gated_expert(p["w1_EFD"], p["w3_EFD"], p["w2_EDF"], F.silu)
    limit = moe.routed_experts.inner_experts.swiglu_limit

    def expert(x: Tensor) -> Tensor:
        z = x @ p["mlp1_weight_EGD"].T + p["mlp1_bias_EG"]
        gate, up = z[..., ::2].clamp(max=limit), z[..., 1::2].clamp(-limit, limit)
        return (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ p["mlp2_weight_EDF"].T + p["mlp2_bias_ED"]

    return expert


def dense(moe: Any, parameters: dict[str, Tensor], x: Tensor, index: Tensor, estimator: str) -> Tensor:
    """The layer by the oracle, shared experts included; x is [tokens, hidden]."""
    router = moe.router
    score = torch.sigmoid if router.score_func == "sigmoid" else functools.partial(torch.softmax, dim=-1)
    formula = oracle.Formula(
        [expert_of(moe, parameters, j) for j in range(router.num_experts)],
        score,
        router.route_norm,
        router.route_scale,
        1e-20 if router.route_norm else 0.0,
    )
    logits = x @ parameters["router.gate.weight"].T + parameters.get("router.gate.bias", 0.0)
    y = oracle.densemixer(x, logits, index, formula, estimator)
    if moe.shared_experts is None:
        return y
    w1, w2, w3 = (parameters[f"shared_experts.w{n}.weight"] for n in (1, 2, 3))
    return y + oracle.gated_expert(w1, w3, w2, F.silu)(x)


def truth(moe: Any, x: Tensor, g: Tensor, index: Tensor, estimator: str) -> dict[str, Tensor]:
    """All gradients by the oracle, in float64."""
    parameters = {name: value.detach().double().requires_grad_() for name, value in moe.named_parameters()}
    x = x.detach().double().flatten(0, -2).requires_grad_()
    y = dense(moe, parameters, x, index, estimator)
    leaves = {**parameters, "x": x}
    found = torch.autograd.grad(y, list(leaves.values()), g.double().flatten(0, -2))
    gradients = dict(zip(leaves, found, strict=True))
    return {**gradients, "x": gradients["x"].view(g.shape)}
