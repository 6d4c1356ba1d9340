"""What is checked of a layer on each rank, against the dense oracle that has the whole layer in one process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import oracle
import torch
import torch.distributed as dist
from cases import EXPERTS, HIDDEN, SIGMOID, Case, K, jitter
from draws import bias
from megatron.core import parallel_state
from moe_layer import Gradients, batch, build, experts_of, full_experts, run, weights
from torch import Tensor
from torch.nn import functional as F

from densemixer_adapters.expert_parallel import gathered_dots
from densemixer_adapters.megatron import apply_densemixer
from densemixer_adapters.megatron.experts import read_experts
from densemixer_core import DenseMixerConfig

TOLERANCE = 1e-5


@dataclasses.dataclass
class Report:
    """What `check` found on this rank.

    Attributes:
        errors: The error of a gradient against the oracle, by what it is of: max |ours − truth| / max |truth|, in half
            precision ‖ours − truth‖ / ‖truth‖.
        allowed: What these must not exceed: in half precision, the errors of a dense implementation in the same dtype
            and a tenth, and one rounding.
        difference: ‖router gradient with − without‖ / ‖without‖.
        same_output: Whether the output is bitwise the same with and without.
        same_experts: Whether the gradients of the experts are bitwise the same with and without.
        same_measured: Whether output and gradients are bitwise the same while router metrics are measured.
        norm: The error of the measured norm of the router's gradient, over the norm.
    """

    errors: dict[str, float]
    allowed: dict[str, float]
    difference: float
    same_output: bool
    same_experts: bool
    same_measured: bool
    norm: float


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z: F.softplus(z).sqrt(),
}


def truth(layer: Any, x: Tensor, g: Tensor, index: Tensor, estimator: str, dtype: torch.dtype) -> Gradients:
    """The dense oracle's, with the whole layer in this process."""
    settings = layer.config
    x = x.to(dtype).reshape(-1, HIDDEN).requires_grad_()
    full = (weights("router"), *full_experts(settings))
    router, up, down = (w.to(settings.params_dtype).to(dtype).requires_grad_() for w in full)
    latent = getattr(settings, "moe_latent_size", None)

    def bias_of(linear: Any, name: str = "bias") -> Tensor | float:
        return getattr(linear, name).detach().to(dtype) if settings.add_bias_linear else 0.0

    def expert(j: int) -> Callable[[Tensor], Tensor]:
        linears = getattr(layer.experts, "linear_fc1", None), getattr(layer.experts, "linear_fc2", None)
        biases = [bias_of(linear, f"bias{j}") for linear in linears]

        def output(h: Tensor) -> Tensor:
            h = h @ up[j].t() + biases[0]
            if settings.gated_linear_unit:
                gate, h = h.chunk(2, -1)
                return (settings.activation_func(gate) * h) @ down[j].t() + biases[1]
            return settings.activation_func(h) @ down[j].t() + biases[1]

        return output

    softmax = settings.moe_router_score_function == "softmax"
    formula = oracle.Formula(
        experts=[expert(j) for j in range(EXPERTS)],
        score=SCORES[settings.moe_router_score_function],
        renormalised=not settings.moe_router_pre_softmax if softmax else settings.moe_router_topk > 1,
        scaling=settings.moe_router_topk_scaling_factor or 1.0,
    )
    seen = x * jitter(x.shape).to(dtype) if settings.moe_input_jitter_eps else x  # by the router
    inner = x @ weights("to_latent").to(dtype).t() if latent else x
    y = oracle.densemixer(inner, seen @ router.t() + bias_of(layer.router), index, formula, estimator)
    if latent:
        y = y @ weights("from_latent").to(dtype).t()
    y.backward(g.to(dtype).reshape(-1, HIDDEN))
    for weight in (up, down):
        dist.all_reduce(weight.grad)
    experts = [gradient for _, gradient in experts_of(layer, up.grad, down.grad)]
    return Gradients(y.detach().view(g.shape), router.grad, x.grad.view(g.shape), experts)


def check(case: Case, dispatcher: str) -> Report:
    """Compare a layer with DenseMixer with one without, and with the oracle."""
    x, g = batch(case)
    without, index = run(build(case, dispatcher), x, g)
    layer = build(case, dispatcher)
    apply_densemixer(layer, DenseMixerConfig(case.estimator, budget=case.budget))
    ours, same_index = run(layer, x, g)
    assert torch.equal(index, same_index)
    layer = build(case, dispatcher)
    handle = apply_densemixer(layer, DenseMixerConfig(case.estimator, budget=case.budget, metrics=True))
    measured, _ = run(layer, x, g)
    whole = measured.router.clone()
    dist.all_reduce(whole)
    norm = (whole / parallel_state.get_data_parallel_world_size()).norm().item()

    exact = truth(layer, x, g, index, case.estimator, torch.float64)
    if case.host_adds:
        conventional = truth(layer, x, g, index, "conventional", torch.float64)
        exact.router += without.router - conventional.router
        exact.x += without.x - conventional.x
    report = Report(
        {},
        {},
        oracle.relative_error(ours.router, without.router),
        torch.equal(ours.output, without.output),
        all(torch.equal(*pair) for pair in zip(ours.experts, without.experts, strict=True)),
        all(torch.equal(*pair) for pair in zip(tensors(ours), tensors(measured), strict=True)),
        abs(handle.metrics()["densemixer/router_grad_norm"] - norm) / norm,
    )
    for gradient in ours.experts:
        dist.all_reduce(gradient, group=parallel_state.get_expert_data_parallel_group())
    half = case.dtype != torch.float32
    report.errors = compare(ours, exact, oracle.relative_error if half else oracle.worst_error, case)
    report.allowed = dict.fromkeys(report.errors, TOLERANCE if case.budget == 1 else 0.1)
    if half:
        dense = truth(layer, x, g, index, case.estimator, case.dtype)
        errors = compare(dense, exact, oracle.relative_error, case)
        report.allowed = {name: 1.1 * error + torch.finfo(case.dtype).eps for name, error in errors.items()}
    return report


def tensors(of: Gradients) -> list[Tensor]:
    return [of.output, of.router, of.x, *of.experts]


def compare(
    ours: Gradients, exact: Gradients, error: Callable[[Tensor, Tensor], float], case: Case
) -> dict[str, float]:
    errors = {"router": error(ours.router, exact.router), "x": error(ours.x, exact.x)}
    if not case.host_adds:
        errors["experts"] = error(*(torch.cat([one.flatten() for one in of.experts]) for of in (ours, exact)))
    return errors


def drawing() -> dict[str, float]:
    """Router gradients with a budget of a third, where ranks differ in tokens, against the exact one.

    Returns:
        ``spread``: the root mean square of the errors of draws; ``mean``: the error of their mean, over that which
        independent draws of this spread would have; ``bias``: the mean's largest distance from the exact gradient in
        some directions, in standard errors; ``output``: the error of the forward.
    """
    case = Case(uneven=True, estimator="centered")
    x, g = batch(case)
    layer = build(case)
    with apply_densemixer(layer, DenseMixerConfig("centered")):
        exact, _ = run(layer, x, g)
    some = []
    with apply_densemixer(layer, DenseMixerConfig("centered", budget=1 / 3)) as handle:
        output, _ = layer(x.requires_grad_())
        for seed in range(150):  # pairs are drawn in the backward, so one forward will do
            handle.layers[0].config = DenseMixerConfig("centered", budget=1 / 3, seed=seed)
            some += torch.autograd.grad(output, layer.router.weight, g, retain_graph=True)
    draws = torch.stack(some).double()
    truth = exact.router.double()
    spread = float((draws - truth).square().sum((1, 2)).mean().sqrt() / truth.norm())
    return {
        "spread": spread,
        "mean": oracle.relative_error(draws.mean(0), truth) / (spread / len(draws) ** 0.5),
        "bias": bias(draws, truth),
        "output": oracle.worst_error(output.detach(), exact.output),
    }


def gathering() -> dict[str, float]:
    """Inner products gathered in parts of a few tokens against those gathered at once, where ranks differ in tokens."""
    case = Case(uneven=True)
    layer = build(case)
    x, g = (tensor.reshape(-1, HIDDEN) for tensor in batch(case))
    evaluate = functools.partial(
        gathered_dots,
        x,
        g,
        None,
        experts=read_experts(layer, "layer"),
        indices=layer.local_expert_indices,
        count=EXPERTS,
        selected=K,
        group=layer.token_dispatcher.tp_ep_group,
        budget=1.0,
        seed=0,
    )
    with torch.no_grad():
        whole, parts = (evaluate(workspace_bytes=size) for size in (1 << 20, 3 << 10))
    up, down = (w.double() for w in full_experts(layer.config))
    gates, ups = torch.einsum("th,ewh->tew", x.double(), up).chunk(2, -1)
    exact = torch.einsum("tew,ehw,th->te", F.silu(gates) * ups, down, g.double())
    return {"whole": oracle.worst_error(whole, exact), "parts": oracle.worst_error(parts, exact)}


def measuring(split: bool = True) -> dict[str, dict[str, float]]:
    """Router metrics of two micro-batches, and what they are of all ranks' tokens and experts in one process.

    Args:
        split: Whether ranks that share a tensor have tokens of their own, by sequence parallelism. Without it Megatron
            doesn't train.
    """
    case = Case(SIGMOID if split else {**SIGMOID, "sequence_parallel": False})
    layer = build(case).train(split)
    handle = apply_densemixer(layer, DenseMixerConfig(metrics=True))
    one, other = batch(case, dist.get_rank() if split else parallel_state.get_data_parallel_rank())
    total, rest = torch.zeros(2, EXPERTS, HIDDEN, dtype=torch.float64)
    counts = torch.zeros(EXPERTS, dtype=torch.float64)
    for x, g in ((one, other), (other, one)):
        layer.zero_grad()
        _, index = run(layer, x, g)
        total += truth(layer, x, g, index, "densemixer", torch.float64).router
        rest += truth(layer, x, g, index, "conventional", torch.float64).router
        counts += index.flatten().bincount(minlength=EXPERTS)
    for tensor in (total, rest, counts):
        dist.all_reduce(tensor)
    # Megatron's gradient is a sum over the tokens of a sequence, and a mean over sequences.
    means = parallel_state.get_data_parallel_world_size() if split else dist.get_world_size()
    total, rest = total / means, rest / means
    added, shares = (total - rest).norm(), counts / counts.sum()
    exact = {
        "router_grad_norm": total.norm(),
        "router_grad_share_unselected": added / (added + rest.norm()),
        "router_grad_cosine_conventional": F.cosine_similarity(total.flatten(), rest.flatten(), 0),
        "load_entropy": -(shares * shares.log()).sum() / torch.tensor(EXPERTS).log(),
        "load_max_over_mean": shares.max() * EXPERTS,
    }
    return {"found": handle.metrics(), "exact": {name: float(value) for name, value in exact.items()}}
