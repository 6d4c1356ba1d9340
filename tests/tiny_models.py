"""Tiny models with random weights, and a tokenizer for them: what the tests train, whatever the framework."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor

COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
"""Of each configuration, besides what its family has by other names."""

QWEN = dict(num_experts=8, moe_intermediate_size=48, norm_topk_prob=True, head_dim=16)

REACHABLE = 4
"""The number of experts that can be selected after `make_half_unreachable`."""


def build(name: str, seed: int = 0, implementation: str | None = None, **options: Any) -> Any:
    """A causal language model as transformers initialises it.

    Args:
        name: Of its classes, up to ``Config`` and ``ForCausalLM``.
        seed: Of its weights.
        implementation: Of its experts; by default transformers' choice.
        options: Of its configuration, over `COMMON`.
    """
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    if implementation is not None:
        config._experts_implementation = implementation
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def qwen3_moe(seed: int = 0, **options: Any) -> Any:
    """Two layers with 8 experts, 2 of them selected, and weights that make a difference."""
    model = build("Qwen3Moe", seed, **{**QWEN, **options})
    randomise(model.named_parameters())
    return model


@torch.no_grad()
def randomise(tensors: Iterable[tuple[str, Tensor]], std: float = 0.2) -> None:
    """Normally distributed, far larger than transformers makes them; norms stay as they are."""
    for name, tensor in tensors:
        if "norm" not in name and tensor.is_floating_point():
            tensor.normal_(std=std)


@torch.no_grad()
def make_half_unreachable(model: Any) -> None:
    """Of 8 experts. Router rows a, −a, b, −b and zeros: two of the first four logits are never below the others'."""
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight
        rows[1], rows[3] = -rows[0], -rows[2]
        rows[REACHABLE:] = 0


def byte_tokenizer(template: str) -> Any:
    """A token for each byte, and one for the end of a text, of a turn and its beginning.

    Args:
        template: Of a chat.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )
