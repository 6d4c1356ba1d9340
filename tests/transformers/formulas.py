"""What each architecture computes, written down from its model card or paper, independently of the product.

An entry holds a router's score function, whether the selected scores are divided by their sum, and the factor on the
weights; how logits come about and what an expert is, where that is unusual.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear(router: Any, x: Tensor) -> Tensor:
    return F.linear(x, router.weight, getattr(router, "bias", None))


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def sqrtsoftplus(logits: Tensor) -> Tensor:
    return logits.exp().log1p().sqrt()


@dataclasses.dataclass(frozen=True)
class Formula:
    score: Callable[[Tensor], Tensor]
    renormalised: bool | str  # or the name of the option of the model's configuration
    scaling: float | str = 1.0  # likewise
    logits: Callable[[Any, Tensor], Tensor] = linear
    epsilon: float = 0.0  # added to the sum of the selected scores
    expert_scale: str | None = None
    further: Callable[[Tensor], Tensor] | None = None  # experts beyond those with weights


def _gemma(router: Any, x: Tensor) -> Tensor:
    x = x * (x.pow(2).mean(-1, keepdim=True) + router.eps).rsqrt()
    return F.linear(x * router.scale * x.shape[-1] ** -0.5, router.proj.weight)


def _laguna(router: Any, x: Tensor) -> Tensor:
    cap = router.router_logit_softcapping
    return cap * torch.tanh(linear(router, x) / cap) if cap else linear(router, x)


def _zaya(router: Any, x: Tensor) -> Tensor:
    return router.seen_logits  # of a small network with a state from layer to layer, recorded


SOFTMAX = Formula(softmax, False)
RENORMALISED = Formula(softmax, True)
QWEN = Formula(softmax, "norm_topk_prob")
DEEPSEEK_V2 = Formula(softmax, False, "routed_scaling_factor")
DEEPSEEK_V3 = Formula(torch.sigmoid, "norm_topk_prob", "routed_scaling_factor", epsilon=1e-20)
SIGMOID = Formula(torch.sigmoid, True)
GEMMA = Formula(softmax, True, logits=_gemma, expert_scale="per_expert_scale")

# By the folder of the architecture; of one with several kinds of layers, the others by the name of their block's class.
FORMULAS: dict[str, Formula] = {
    "afmoe": Formula(
        torch.sigmoid, True, "route_scale", lambda router, x: F.linear(x, router.gate.weight), epsilon=1e-20
    ),
    "aria": RENORMALISED,
    "axk1": DEEPSEEK_V3,
    "axk2": DEEPSEEK_V3,
    "bailing_hybrid": DEEPSEEK_V3,
    "beam": Formula(torch.sigmoid, "norm_topk_prob", epsilon=1e-20),  # scaled outside of the experts
    "cohere2_moe": Formula(softmax, True),
    "deepseek_ocr2": DEEPSEEK_V2,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3,
    "deepseek_v4": Formula(sqrtsoftplus, True, "routed_scaling_factor", epsilon=1e-20),
    "diffusion_gemma": GEMMA,
    "dots1": DEEPSEEK_V3,
    "dots3_note": DEEPSEEK_V3,
    "Dots3NoteVisionMoE": Formula(torch.sigmoid, True, "router_scaling_factor", epsilon=1e-20),
    "ernie4_5_moe": RENORMALISED,
    "ernie4_5_vl_moe": RENORMALISED,
    "exaone_moe": DEEPSEEK_V3,
    "flex_olmo": QWEN,
    "flint": Formula(torch.sigmoid, "norm_topk_prob"),
    "gemma4": GEMMA,
    "glm4_moe": DEEPSEEK_V3,
    "glm4_moe_lite": DEEPSEEK_V3,
    "glm4v_moe": DEEPSEEK_V3,
    "glm5_next": DEEPSEEK_V3,
    "glm_moe_dsa": DEEPSEEK_V3,
    "gpt_oss": RENORMALISED,
    "granitemoe": RENORMALISED,
    "granitemoe_swa": RENORMALISED,
    "granitemoehybrid": RENORMALISED,
    "granitemoeshared": RENORMALISED,
    "hunyuan_v1_moe": Formula(softmax, True, logits=lambda router, x: F.linear(x, router.wg.weight)),
    "hy_v3": Formula(torch.sigmoid, True, "router_scaling_factor", epsilon=1e-20),
    "hy_v4": DEEPSEEK_V3,
    "hy_v4_vl": DEEPSEEK_V3,
    "inkling2": Formula(torch.sigmoid, True, "routed_scaling_factor", epsilon=1e-20),
    "inkling2_loop": Formula(torch.sigmoid, True, "routed_scaling_factor", epsilon=1e-20),
    "jamba": SOFTMAX,
    "kimi_linear": DEEPSEEK_V3,
    "kolibri1": Formula(torch.sigmoid, "norm_topk_prob"),
    "laguna": Formula(torch.sigmoid, True, logits=_laguna),
    "lara_mini": QWEN,
    "lfm2_moe": Formula(torch.sigmoid, "norm_topk_prob", "routed_scaling_factor", epsilon=1e-6),
    "longcat_flash": Formula(
        softmax,
        False,
        "routed_scaling_factor",
        logits=lambda router, x: F.linear(x, router.classifier.weight),
        further=lambda x: x,
    ),
    "mellum": QWEN,
    "mimo_v2_flash": DEEPSEEK_V3,
    "minimax": RENORMALISED,
    "minimax_m2": SIGMOID,
    "minimax_m3_vl": SIGMOID,
    "mistral4": Formula(softmax, "norm_topk_prob", "routed_scaling_factor", epsilon=1e-20),
    "mistral_large4": Formula(softmax, True, "routed_scaling_factor", epsilon=1e-20),
    "mixtral": RENORMALISED,
    "muse_spark": Formula(
        torch.sigmoid,
        True,
        "routed_scaling_factor",
        logits=lambda router, x: linear(router, x) * router.output_multiplier,
        epsilon=1e-20,
    ),
    "nemotron_h": DEEPSEEK_V3,
    "olmoe": QWEN,
    "openai_privacy_filter": Formula(softmax, True, 1 / 3),  # over top-k, made up for outside of the experts
    "qwen2_moe": QWEN,
    "qwen3_5_moe": RENORMALISED,
    "qwen3_moe": QWEN,
    "qwen3_next": QWEN,
    "qwen3_omni_moe": QWEN,
    "qwen3_vl_moe": RENORMALISED,
    "qwen4_exp": QWEN,
    "solar_open": DEEPSEEK_V3,
    "step3p7": SIGMOID,
    "unlimited_ocr": DEEPSEEK_V2,
    "zaya": Formula(softmax, False, logits=_zaya, further=torch.zeros_like),
}


def expert(experts: Any, j: int) -> Callable[[Tensor], Tensor]:
    """Expert j as a function of [tokens, hidden]; its activation is the host's own."""
    gated, biased = getattr(experts, "has_gate", True), getattr(experts, "has_bias", False)
    name = "gate_up_proj" if gated else "up_proj"
    transposed = getattr(experts, "is_transposed", False)

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)[j]
        y = x @ (weight if transposed else weight.T)
        return y + getattr(experts, f"{name}_bias")[j] if biased else y

    def run(x: Tensor) -> Tensor:
        h = project(x, name)
        if not gated:
            h = experts.act_fn(h)
        elif hasattr(experts, "_apply_gate"):
            h = experts._apply_gate(h)
        else:
            gate, up = h.chunk(2, -1)
            h = experts.act_fn(gate) * up
        y = project(h, "down_proj")
        return experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", False) else y

    return run


def dense(model: nn.Module, layers: list[tuple[nn.Module, nn.Module]], formula: Formula, estimator: str) -> nn.Module:
    """A copy of the model whose ``layers``, (block, router) each, compute the oracle instead of their experts."""
    memo: dict[int, Any] = {}
    truth = copy.deepcopy(model, memo)
    for block, router in layers:
        own = FORMULAS.get(type(block).__name__, formula)
        _make_dense(memo[id(block)].experts, memo[id(router)], own, estimator, model.config.get_text_config())
    return truth


def _make_dense(experts: Any, router: Any, formula: Formula, estimator: str, config: Any) -> None:
    config = getattr(experts, "config", config)

    def option(value: Any) -> Any:
        return getattr(config, value) if isinstance(value, str) else value

    def before_router(module: Any, args: tuple[Any, ...]) -> None:
        router.seen = args[0].reshape(-1, args[0].shape[-1])

    def after_router(module: Any, args: tuple[Any, ...], output: Any) -> None:
        router.seen_logits = output[0]

    def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        logits = formula.logits(router, router.seen)
        functions = [expert(self, j) for j in range(len(self.down_proj))]
        if formula.expert_scale:
            scale = getattr(router, formula.expert_scale)
            functions = [lambda x, f=f, s=s: s * f(x) for f, s in zip(functions, scale, strict=True)]
        if formula.further is torch.zeros_like:
            index = torch.where(weights == 0, len(functions), index)  # the host names expert 0 there
        if formula.further:
            functions += [formula.further] * (logits.shape[-1] - len(functions))
        layer = oracle.Formula(
            functions, formula.score, bool(option(formula.renormalised)), option(formula.scaling), formula.epsilon
        )
        flat = x.reshape(-1, x.shape[-1])
        return oracle.densemixer(flat, logits, index, layer, estimator).reshape(x.shape)

    router.register_forward_pre_hook(before_router)
    router.register_forward_hook(after_router)
    experts.forward = types.MethodType(forward, experts)
