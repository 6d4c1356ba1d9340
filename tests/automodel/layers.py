"""Automodel's own Mixture-of-Experts layer, tiny, beside the formula written out in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import Gate, MoE
from torch import Tensor
from torch.nn import functional as F

HIDDEN, FFN, EXPERTS, K = 16, 24, 8, 2

CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, renormalised": {"norm_topk_prob": True},
    "softmax over the selected": {"softmax_before_topk": False},
    "softmax with a bias": {"score_func": "softmax_with_bias", "norm_topk_prob": True, "biased": True},
    "sigmoid": {"score_func": "sigmoid", "router_bias": True},
    "sigmoid, renormalised, scaled": {"score_func": "sigmoid", "norm_topk_prob": True, "route_scale": 2.5},
    "sigmoid, groups, a bias": {"score_func": "sigmoid", "norm_topk_prob": True, "biased": True, "groups": 4},
    "sigmoid_with_bias": {"score_func": "sigmoid_with_bias", "norm_topk_prob": True, "biased": True, "groups": 4},
    "sqrtsoftplus": {"score_func": "sqrtsoftplus", "norm_topk_prob": True, "biased": True},
    "one expert a token": {"norm_topk_prob": True, "n_activated_experts": 1},
    "gpt-oss": {"softmax_before_topk": False, "expert_activation": "quick_geglu", "expert_bias": True},
    "swigluoai": {"expert_activation": "swigluoai", "expert_bias": True},
    "swiglu with a limit": {"swiglu_limit": 0.3},
    "geglu": {"expert_activation": "geglu"},
    "relu2": {"expert_activation": "relu2", "score_func": "sigmoid", "norm_topk_prob": True},
    "latent": {"moe_latent_size": 8},
    "weights after the down projection": {"apply_router_weight_after_down": True},
    "weights in float32": {"router_weights_fp32": True, "norm_topk_prob": True},
    "auxiliary loss": {"norm_topk_prob": True, "aux_loss_coeff": 0.5},
    "shared experts": {"n_shared_experts": 1},
}
"""What differs from a plain layer; ``groups`` and ``biased`` are explained in `build`."""

NEWER = (
    "sigmoid_with_bias",
    "sqrtsoftplus",
    "swigluoai",
    "swiglu with a limit",
    "geglu",
    "weights after the down projection",
    "weights in float32",
    "shared experts",  # on a stream of CUDA before
)
"""What Automodel 0.4 doesn't have."""
if not hasattr(Gate, "_route_scores"):
    for newer in NEWER:
        del CASES[newer]

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


@dataclasses.dataclass
class Layer:
    """A layer with its configuration, and its parameters as they were when it was built, in float64."""

    moe: Any
    config: Any
    truth: dict[str, Tensor]


def build(case: str, experts: str = "torch", dtype: torch.dtype = torch.float32, **backend: Any) -> Layer:
    """A layer of random weights: the same in each process."""
    settings: dict[str, Any] = dict(CASES[case])
    groups = settings.pop("groups", 0)
    config = MoEConfig(
        **{
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 0,
            "n_activated_experts": K,
            "n_expert_groups": groups,
            "n_limited_groups": groups // 2,
            "train_gate": True,
            "gate_bias_update_factor": 0.0,
            "aux_loss_coeff": 0.0,
            "score_func": "softmax",
            "softmax_before_topk": True,
            "norm_topk_prob": False,
            "route_scale": 1.0,
            "dim": HIDDEN,
            "inter_dim": FFN,
            "moe_inter_dim": FFN,
            "dtype": dtype,
            "force_e_score_correction_bias": settings.pop("biased", False),  # for the selection alone
            **settings,
        }
    )
    plain = BackendConfig(**{"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "dispatcher": "torch", **backend})
    plain.experts = experts
    moe = MoE(config, plain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if getattr(moe.gate, "e_score_correction_bias", None) is not None:
            moe.gate.e_score_correction_bias.copy_(0.3 * torch.randn(EXPERTS, generator=generator))
    truth = {name: value.detach().double().requires_grad_() for name, value in moe.named_parameters()}
    return Layer(moe, config, truth)


def activate(config: Any, inner: Tensor) -> Tensor:
    """The formulas of Automodel's experts once more."""
    kind = config.expert_activation
    if kind == "relu2":
        return F.relu(inner) ** 2
    if kind == "quick_geglu":  # of gpt-oss: gate and up values take turns
        gate, up = inner[..., ::2].clamp(max=7), inner[..., 1::2].clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = inner.chunk(2, -1)
    if kind == "swigluoai":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if limit := getattr(config, "swiglu_limit", 0.0):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.gelu(gate, approximate="tanh") if kind == "geglu" else F.silu(gate)) * up


def expert(layer: Layer, position: int, x: Tensor) -> Tensor:
    truth = layer.truth
    up = x @ truth["experts.gate_and_up_projs"][position]
    if layer.config.expert_bias:
        up = up + truth["experts.gate_up_proj_bias"][position]
    down = activate(layer.config, up) @ truth["experts.down_projs"][position]
    return down + truth["experts.down_proj_bias"][position] if layer.config.expert_bias else down


def expected(layer: Layer, x: Tensor, index: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """The layer's output in float64 with the gradients of an estimator; x [tokens, hidden], mask: no padding."""
    config, truth = layer.config, layer.truth
    score = config.score_func.partition("_")[0]
    over_selected = config.score_func == "softmax" and not config.softmax_before_topk
    formula = oracle.Formula(
        [functools.partial(expert, layer, position) for position in range(EXPERTS)],
        SCORES[score],
        over_selected or (config.norm_topk_prob and index.shape[1] > 1),
        config.route_scale,
    )
    latent = "fc1_latent_proj.weight" in truth
    inner = x @ truth["fc1_latent_proj.weight"].T if latent else x
    logits = x @ truth["gate.weight"].T
    if config.router_bias:
        logits = logits + truth["gate.bias"]
    y = oracle.densemixer(inner, logits, index, formula, estimator) * mask.unsqueeze(1)
    if latent:
        y = y @ truth["fc2_latent_proj.weight"].T
    if config.n_shared_experts:
        gate, up, down = (truth[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        y = y + oracle.gated_expert(gate, up, down, F.silu)(x)
    if config.aux_loss_coeff:
        y = y + _Auxiliary.apply(torch.zeros_like(y), auxiliary_loss(layer, formula.score(logits), index, mask))
    return y


def auxiliary_loss(layer: Layer, scores: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """What Automodel adds to the loss for balance, once more."""
    config = layer.config
    if config.norm_topk_prob:
        scores = scores / scores.sum(-1, keepdim=True)
    load = torch.zeros(EXPERTS, dtype=scores.dtype).index_add_(
        0, index.flatten(), mask.to(scores.dtype).repeat_interleave(index.shape[1])
    )
    tokens = mask.sum()
    share = load * EXPERTS / (index.shape[1] * tokens)
    return config.aux_loss_coeff * (share * (scores * mask.unsqueeze(1)).sum(0) / tokens).sum()


class _Auxiliary(torch.autograd.Function):
    """The identity on y that has the gradient of another loss, 1, besides."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, g.new_ones(())


def batches(lengths: Sequence[int], padding: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each rank: the layer's input and the gradient of its output, [tokens, hidden], and which are no padding."""
    generator = torch.Generator().manual_seed(1)
    xs, gs = ([torch.randn(length, HIDDEN, generator=generator) for length in lengths] for _ in range(2))
    return xs, gs, [torch.arange(length) >= (2 if padding else 0) for length in lengths]
