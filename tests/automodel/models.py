"""A tiny Qwen3-MoE on disk, and what each training run of it is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate" in name:  # so that routing and experts matter
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
