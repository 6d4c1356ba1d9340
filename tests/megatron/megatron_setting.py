"""A small Mixture-of-Experts layer of Megatron Core under any layout, and the dense oracle's gradients of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import cpu
import megatron.core
import oracle
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts as experts_module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F

from densemixer_adapters.expert_parallel import gathered_dots
from densemixer_adapters.megatron import apply_densemixer
from densemixer_adapters.megatron.experts import read_experts
from densemixer_core import DenseMixerConfig

EXPERTS, K, HIDDEN, FFN, LATENT = 8, 2, 16, 8, 12
SEQUENCE, BATCH = 6, 2
TOLERANCE = 1e-5


def has(since: str) -> bool:
    """Whether this Megatron Core is of that version or newer."""
    return Version(megatron.core.__version__) >= Version(since)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to configure the layer.

    Args:
        options: For ``TransformerConfig``, besides `config`'s.
        dispatchers: Those it works with.
        experts: The class of the experts.
        uneven: Whether each rank has another number of tokens.
        host_adds: Whether Megatron adds gradients of its own (losses of the router, shared experts), which the oracle
            doesn't know: then what DenseMixer adds is compared.
        estimator: Of DenseMixer.
        budget: Of DenseMixer. Just below 1 all pairs but the pilot's share are drawn, and it is nearly exact.
        dtype: Of weights and inputs.
        since: The version of Megatron Core that has it.
        prepare: What to do with the built layer.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dispatchers: tuple[str, ...] = ("allgather", "alltoall")
    experts: str = "SequentialMLP"
    uneven: bool = False
    host_adds: bool = False
    estimator: str = "densemixer"
    budget: float = 1.0
    dtype: torch.dtype = torch.float32
    since: str = "0.13"
    prepare: Callable[[Any], None] = lambda layer: None

    @property
    def exists(self) -> bool:
        return has(self.since) and hasattr(experts_module, self.experts)


def _bias_two_experts(layer: Any) -> None:
    layer.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))


def _balance_two_experts(layer: Any) -> None:
    layer.router.qb_beta.copy_(torch.linspace(-0.3, 0.3, EXPERTS))


def _jitter(shape: torch.Size) -> Tensor:
    return 1 + 0.3 * torch.sin(torch.arange(shape.numel())).view(shape)


def _know_jitter(layer: Any) -> None:
    """The noise on the router's input, which is drawn otherwise."""
    layer.router.input_jitter = _jitter


def _fill_biases(layer: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    for name, parameter in layer.named_parameters():
        if name.rpartition(".")[2].startswith("bias"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def _fill_shared_experts(layer: Any) -> None:
    """So that their output is no small part of the layer's."""
    generator = torch.Generator().manual_seed(9)
    for parameter in layer.shared_experts.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def _replay(layer: Any) -> None:
    """Replay a selection that the router itself would not make."""
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    tokens = SEQUENCE * BATCH
    layer.router.router_replay.set_target_indices(torch.arange(K * tokens).reshape(tokens, K) % EXPERTS)
    layer.router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5}

LAYOUT_CASES = {
    "softmax after top-k": Case(),
    "softmax before top-k": Case({"moe_router_pre_softmax": True}),
    "sigmoid": Case(SIGMOID),
    "recomputed": Case({"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "uneven": Case(dispatchers=("alltoall",), uneven=True),
}
"""Under every layout."""

SPREAD_CASES = {"flexible": Case({"moe_flex_dispatcher_backend": "deepep"}, ("flex",), since="0.16")}
"""Under layouts that spread experts over ranks."""

SHARED = {"moe_shared_expert_intermediate_size": 8}
OVERLAPPED = {**SHARED, "moe_shared_expert_overlap": True}
BESIDE: dict[str, Any] = {"host_adds": True, "prepare": _fill_shared_experts}

CASES = LAYOUT_CASES | {
    "centered": Case(estimator="centered"),
    "centered, scaled": Case(SIGMOID, estimator="centered"),
    "top-1": Case({"moe_router_pre_softmax": True, "moe_router_topk": 1}),
    "scaled": Case({"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5}),
    "groups": Case({**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    "expert bias": Case({**SIGMOID, "moe_router_enable_expert_bias": True}, prepare=_bias_two_experts),
    "not gated": Case({"gated_linear_unit": False, "activation_func": F.gelu}),
    "router in float32": Case({"moe_router_dtype": "fp32"}),
    "router in float64": Case({"moe_router_dtype": "fp64"}),
    "fused activation": Case({"bias_activation_fusion": True}, ("alltoall",)),  # which torch.compile takes its time for
    "auxiliary loss": Case({"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}, host_adds=True),
    "sequence auxiliary loss": Case(
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}, host_adds=True
    ),
    "z loss": Case({"moe_z_loss_coeff": 0.1}, host_adds=True),
    "global auxiliary loss": Case(
        {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
        since="0.16",
        host_adds=True,
    ),
    "shared experts": Case(SHARED, **BESIDE),
    "shared experts, gated": Case({**SHARED, "moe_shared_expert_gate": True}, since="0.16", **BESIDE),
    "shared experts, overlapped": Case(OVERLAPPED, ("alltoall",), **BESIDE),
    "shared experts, overlapped, centered": Case(OVERLAPPED, ("alltoall",), estimator="centered", **BESIDE),
    "shared experts, overlapped, centered, budget": Case(
        OVERLAPPED, ("alltoall",), estimator="centered", budget=1 - 1e-9, **BESIDE
    ),
    "jitter": Case({"moe_input_jitter_eps": 0.3}, prepare=_know_jitter),
    "square root of softplus": Case({**SIGMOID, "moe_router_score_function": "sqrtsoftplus"}, since="0.19"),
    "quantile balancing": Case(
        {**SIGMOID, "moe_router_load_balancing_type": "quantile_balancing"},
        since="0.19",
        prepare=_balance_two_experts,
    ),
    "recomputed, by its old name": Case({"moe_layer_recompute": True}),
    "latent": Case({"moe_latent_size": LATENT}, since="0.16"),
    "replay": Case({"moe_enable_routing_replay": True}, since="0.16", prepare=_replay),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16, router in float32": Case({"moe_router_dtype": "fp32"}, dtype=torch.bfloat16),
    "GroupedMLP": Case(
        {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True}, experts="GroupedMLP", dtype=torch.bfloat16
    ),
    "TEGroupedMLP": Case({"moe_grouped_gemm": True}, experts="TEGroupedMLP"),
    "TEGroupedMLP, biases": Case(
        {"moe_grouped_gemm": True, "add_bias_linear": True},
        experts="TEGroupedMLP",
        since="0.16",
        prepare=_fill_biases,
    ),
}


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
    size = (EXPERTS, values.shape[0], -1) if which == 0 else (EXPERTS, -1, values.shape[1])
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

    def bias(linear: Any, name: str = "bias") -> Tensor | float:
        return getattr(linear, name).detach().to(dtype) if settings.add_bias_linear else 0.0

    def expert(j: int) -> Callable[[Tensor], Tensor]:
        linears = getattr(layer.experts, "linear_fc1", None), getattr(layer.experts, "linear_fc2", None)
        biases = [bias(linear, f"bias{j}") for linear in linears]

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
    seen = x * _jitter(x.shape).to(dtype) if settings.moe_input_jitter_eps else x  # by the router
    inner = x @ weights("to_latent").to(dtype).t() if latent else x
    y = oracle.densemixer(inner, seen @ router.t() + bias(layer.router), index, formula, estimator)
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

    def gradients(options: DenseMixerConfig) -> Gradients:
        layer.zero_grad()
        handle = apply_densemixer(layer, options)
        found, _ = run(layer, x, g)
        handle.remove()
        return found

    exact = gradients(DenseMixerConfig("centered"))
    some = [gradients(DenseMixerConfig("centered", budget=1 / 3, seed=seed)) for seed in range(150)]
    draws = torch.stack([one.router for one in some]).double()
    truth = exact.router.double()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(*truth.shape, 10, generator=generator, dtype=torch.float64)
    errors = torch.einsum("seh,ehd->sd", draws - truth, directions)
    spread = float((draws - truth).square().sum((1, 2)).mean().sqrt() / truth.norm())
    return {
        "spread": spread,
        "mean": oracle.relative_error(draws.mean(0), truth) / (spread / len(draws) ** 0.5),
        "bias": float((errors.mean(0).abs() / (errors.std(0) / len(draws) ** 0.5)).max()),
        "output": oracle.worst_error(some[0].output, exact.output),
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
