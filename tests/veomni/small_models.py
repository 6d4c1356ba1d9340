"""Small models of VeOmni's architectures, and what all their experts would make of the gradients, in float64.

A truth is VeOmni's own model in float64 on one process, with the oracle in the place of its experts.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import stand_ins
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, Qwen3MoeConfig

Gradients = dict[str, Tensor]
VOCABULARY = 64
LENGTHS = (12, 9, 7, 10)
"""Of the sequences of each rank."""


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture.

    Args:
        config: Of a small model.
        score: What makes scores of the router's logits.
        renormalised: Whether the selected experts' scores are divided by their sum.
        scaling: What the weights are multiplied by.
        epsilon: What is added to that sum.
    """

    config: Callable[[], Any]
    score: Callable[[Tensor], Tensor]
    renormalised: bool
    scaling: float = 1.0
    epsilon: float = 0.0


COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
QWEN: dict[str, Any] = {**COMMON, "num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True}
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.5,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


FAMILIES = {
    "qwen3_moe": Family(lambda: Qwen3MoeConfig(**QWEN), softmax, True),
    "gpt_oss": Family(lambda: GptOssConfig(**COMMON, num_local_experts=8, sliding_window=8), softmax, True),
    "deepseek_v3": Family(lambda: DeepseekV3Config(**DEEPSEEK), torch.sigmoid, True, 1.5, 1e-20),
}


@functools.cache
def saved(family: str) -> Path:
    """The folder of a checkpoint with random weights, as transformers writes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config(), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(std=0.3)
    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    return folder


def build(family: str) -> Any:
    """VeOmni's model on this process."""
    return load(str(saved(family)), saved(family))


def load(config: Any, folder: Path, experts: str = "eager") -> Any:
    """VeOmni's model on this process, of a configuration, or the folder with one, with the weights of a checkpoint."""
    from veomni.models import load_model_weights
    from veomni.models.auto import build_foundation_model

    own = stand_ins.operations(experts)
    model = build_foundation_model(config, str(folder), "float32", ops_implementation=own, init_device="cpu")
    if any(parameter.is_meta for parameter in model.parameters()):  # not on the first rank
        load_model_weights(model, str(folder), "cpu")
    return model.train()


def ids_of(part: int) -> Tensor:
    """Two sequences; each part has sequences of a length of its own."""
    generator = torch.Generator().manual_seed(part)
    return torch.randint(0, VOCABULARY, (2, LENGTHS[part]), generator=generator)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients_of(model: nn.Module) -> Gradients:
    return {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def truth_of_part(family: str, estimator: str, part: int) -> Gradients:
    model = make_dense(build(family), FAMILIES[family], estimator)
    with oracle.Float64():
        loss_of(model, ids_of(part)).backward()
    return gradients_of(model)


def truth(family: str, estimator: str, parts: int) -> Gradients:
    """The mean over so many parts, as the ranks take it."""
    found = [truth_of_part(family, estimator, part) for part in range(parts)]
    return {name: sum(one[name] for one in found) / parts for name in found[0]}  # type: ignore[misc]


def blocks_of(model: nn.Module) -> list[tuple[Any, Any]]:
    """Each block with experts, and its router."""
    found = [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]
    return [(block, getattr(block, "gate", None) or block.router) for block in found]  # type: ignore[attr-defined]


def make_dense(model: Any, family: Family, estimator: str) -> Any:
    """Put the oracle into its blocks, in float64."""
    for block, router in blocks_of(model.double()):
        router.register_forward_hook(keep_logits)
        block.experts.forward = types.MethodType(
            functools.partial(dense_forward, router, family, estimator), block.experts
        )
    return model


def keep_logits(router: Any, args: Any, output: Any) -> None:
    router.seen = output[0] if isinstance(output, tuple) else output


def dense_forward(
    router: Any, family: Family, estimator: str, experts: Any, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    functions = [expert(experts, j) for j in range(len(experts.down_proj))]
    formula = oracle.Formula(functions, family.score, family.renormalised, family.scaling, family.epsilon)
    return oracle.densemixer(x, router.seen, index, formula, estimator)


def expert(experts: Any, j: int) -> Callable[[Tensor], Tensor]:
    """Expert j of VeOmni's stacked weights, as a function of [tokens, hidden]."""
    up, down = experts.gate_up_proj[j], experts.down_proj[j]
    if type(experts).__name__ == "GptOssExperts":  # [in, out], gate and up taking turns, with biases

        def gpt_oss(x: Tensor) -> Tensor:
            both = x @ up + experts.gate_up_proj_bias[j]
            gate, linear = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            return (gate * torch.sigmoid(1.702 * gate) * (linear + 1)) @ down + experts.down_proj_bias[j]

        return gpt_oss
    limit = getattr(experts, "limit", None)
    gate, linear = up.chunk(2)
    if limit is None:
        return oracle.gated_expert(gate, linear, down, experts.act_fn)
    return lambda x: (experts.act_fn((x @ gate.T).clamp(max=limit)) * (x @ linear.T).clamp(-limit, limit)) @ down.T


def worst(found: Gradients, truth: Gradients, part: str = "") -> float:
    """The largest error of the gradients whose name has this part, relative to the largest number of each."""
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    errors = [oracle.worst_error(found[name], truth[name]) for name in truth if part in name and truth[name].any()]
    assert errors, part
    return max(errors)


def is_router(name: str) -> bool:
    return ".gate.weight" in name or ".router.weight" in name


def apart(found: Gradients, conventional: Gradients) -> float:
    """How far the routers' gradients are from conventional training, at least."""
    return min(oracle.worst_error(found[name], conventional[name]) for name in found if is_router(name))


def full(tensors: Gradients, state: Any) -> Gradients:
    """Gradients, or weights, of all ranks. Collective.

    Args:
        tensors: This rank's, by name.
        state: VeOmni's, which says how experts are spread.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ".experts." in name and state.ep_enabled:
            parts = [torch.empty_like(whole) for _ in range(state.ep_size)]
            dist.all_gather(parts, whole.contiguous(), group=state.ep_group)
            whole = torch.cat(parts)
        found[name] = whole.clone()
    return found
