"""A small GPTModel of Megatron Core, trained with its own DDP and optimizer."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import cpu
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

EXPERTS, VOCABULARY, SEQUENCES, LENGTH, STEPS = 8, 64, 4, 16, 6
DEAD = EXPERTS // 2
"""The last half of the experts never enter the top-k."""


def build(**options: Any) -> Any:
    """Weights follow from their names, with experts counted over all ranks."""
    settings = TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 16,
            "ffn_hidden_size": 16,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "normalization": "RMSNorm",
            "use_cpu_initialization": True,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **options,
        }
    )
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    model = GPTModel(settings, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH, position_embedding_type="rope")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                generator = torch.Generator().manual_seed(zlib.crc32(_global(name, model).encode()))
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for layer in model.decoder.layers:
            layer.mlp.router.expert_bias[DEAD:] = -100.0
    return model


def _global(name: str, model: Any) -> str:
    before, local, after = name.partition(".local_experts.")
    if not local:
        return name
    position, _, rest = after.partition(".")
    return f"{before}{local}{model.decoder.layers[0].mlp.local_expert_indices[int(position)]}.{rest}"


def train(model: Any, steps: int = STEPS) -> dict[str, Any]:
    """Each rank trains on its part of a batch.

    Returns:
        ``losses`` of all steps, the routers' first ``gradients`` by layer, [experts, hidden] as a list, and the
        ``digest`` of these and of the trained weights.
    """
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.broadcast_params()
    options = OptimizerConfig(optimizer="adam", lr=3e-3, min_lr=3e-3, weight_decay=0.0, clip_grad=0.0)
    with cpu.CudaIsCpu():
        optimizer = get_megatron_optimizer(options, [wrapped])
    batch = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
    positions = torch.arange(LENGTH).expand(len(batch), LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    losses, gradients = [], []
    for _ in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        loss = wrapped(batch[:, :-1], positions, mask, labels=batch[:, 1:]).mean()
        loss.backward()
        finalize_model_grads([wrapped])
        if not gradients:
            gradients = [layer.mlp.router.weight.main_grad.tolist() for layer in model.decoder.layers]
        with cpu.CudaIsCpu():
            succeeded, _, _ = optimizer.step()
        assert succeeded
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / dist.get_world_size())
    state = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return {
        "losses": losses,
        "gradients": gradients,
        "digest": hashlib.sha256(repr(losses).encode() + state).hexdigest(),
    }
