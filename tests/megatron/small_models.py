"""Small models of Megatron Core, or a rank's part of one, with weights that follow from their names."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS, VOCABULARY, LENGTH = 8, 64, 16
DEAD = EXPERTS // 2
"""The last half of the experts never enter the top-k."""


def build(**options: Any) -> Any:
    """The model, where one rank holds all of its layers."""
    (model,) = build_stage(**options)
    return model


def build_stage(
    pattern: str | None = None,
    own_values: bool = False,
    config_class: type[TransformerConfig] = TransformerConfig,
    **options: Any,
) -> list[Any]:
    """This rank's part of a GPTModel or, with a ``pattern``, of a hybrid model: its chunks.

    Weights follow from their names, with layers and experts counted over all ranks.

    Args:
        pattern: Of the layers: attention, ``*``, and experts, ``E``.
        own_values: Whether attention is replaced by what each token gives, which works under context parallelism too.
        config_class: The class of the configuration.
        options: Of the configuration.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    settings = config_class(
        **{
            "num_layers": len(pattern) if pattern else 2,
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
            "context_parallel_size": parallel_state.get_context_parallel_world_size(),
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": virtual,
            "pipeline_dtype": torch.float32 if pipeline > 1 else None,
            # An interleaved pipeline of two stages exchanges otherwise more than one tensor at a time with one peer.
            "overlap_p2p_comm": virtual is not None,
            "batch_p2p_comm": virtual is None,
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
    chunks = []
    for stage in [None] if virtual is None else range(virtual):
        inside = {
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
            "position_embedding_type": "none" if own_values else "rope",
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
        }
        chunks.append(_hybrid(settings, pattern, inside) if pattern else _gpt(settings, stage, own_values, inside))
    with torch.no_grad():
        for chunk in chunks:
            _fill(chunk)
    return chunks


def _gpt(settings: TransformerConfig, stage: int | None, own_values: bool, inside: dict[str, Any]) -> GPTModel:
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, vp_stage=stage)
    if own_values:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = OwnValues
    if settings.mtp_num_layers:
        inside["mtp_block_spec"] = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
    return GPTModel(settings, spec, vp_stage=stage, **inside)


def _hybrid(settings: TransformerConfig, pattern: str, inside: dict[str, Any]) -> Any:
    """Of the parts of a GPTModel's layers: Megatron's own are Transformer Engine's."""
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    try:
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel as Model

        stack, submodules, name = block.HybridStack, block.HybridStackSubmodules, "hybrid_layer_pattern"
    except ImportError:  # before 0.17
        from megatron.core.models.mamba.mamba_model import MambaModel as Model
        from megatron.core.ssm import mamba_block as block

        stack, submodules, name = block.MambaStack, block.MambaStackSubmodules, "hybrid_override_pattern"
    block.TENorm = WrappedTorchNorm  # the norm after the last layer
    parts = get_gpt_decoder_block_spec(settings, use_transformer_engine=False).layer_specs[0].submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm, self_attention=parts.self_attention, self_attn_bda=parts.self_attn_bda
    )
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
    )
    layers = submodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
        moe_layer=ModuleSpec(TransformerLayer, submodules=experts),
    )
    return Model(settings, ModuleSpec(stack, submodules=layers), **{name: pattern}, **inside)


class OwnValues(nn.Module):
    """In the place of attention: each token's own value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return value.flatten(2)


def _fill(chunk: Any) -> None:
    numbers = {name: str(layer.layer_number) for name, layer in chunk.decoder.layers.named_children()}
    for name, parameter in chunk.named_parameters():
        if "norm" not in name:
            name = re.sub(r"^decoder\.layers\.(\d+)", lambda match: f"decoder.layers.{numbers[match[1]]}", name)
            generator = torch.Generator().manual_seed(zlib.crc32(_of_all_experts(name, chunk).encode()))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for _, layer in moe_layers([chunk]):
        layer.router.expert_bias[DEAD:] = -100.0


def _of_all_experts(name: str, chunk: Any) -> str:
    before, local, after = name.partition(".local_experts.")
    if not local:
        return name
    position, _, rest = after.partition(".")
    (_, layer), *_ = moe_layers([chunk])
    return f"{before}{local}{layer.local_expert_indices[int(position)]}.{rest}"


def moe_layers(chunks: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    """Each layer, and its number among all stages' layers; its name where it is for multi-token prediction."""
    found = [(name, layer) for chunk in chunks for name, layer in chunk.named_modules() if isinstance(layer, MoELayer)]
    return [(name if name.startswith("mtp.") else str(layer.layer_number), layer) for name, layer in found]
