"""A tiny Qwen3-MoE with a byte tokenizer, arithmetic prompts, and conversations for SFT, all made here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pandas
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeForTokenClassification

EXPERTS, REACHABLE = 8, 4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_assets(folder: Path) -> None:
    """The data files, and models: ``model``, and variants of it.

    Half of the experts of ``half_dead`` can't be selected, ``dense`` has none, ``critic`` has a value head.
    """
    make_data(folder)
    tokenizer = make_tokenizer()
    half_dead = make_model(tokenizer)
    kill_half_of_the_experts(half_dead)
    dense = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**half_dead.config.to_dict(), "mlp_only_layers": [0, 1]}))
    model = make_model(tokenizer)
    critic = Qwen3MoeForTokenClassification(Qwen3MoeConfig(**{**model.config.to_dict(), "num_labels": 1}))
    critic.model.load_state_dict(model.model.state_dict())
    for name, variant in {"model": model, "half_dead": half_dead, "dense": dense, "critic": critic}.items():
        variant.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return model


def kill_half_of_the_experts(model: Qwen3MoeForCausalLM) -> None:
    """Router rows a, −a, b, −b and zeros: two of the first four logits are never below the others'."""
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.mlp.gate.weight
            rows[1], rows[3] = -rows[0], -rows[2]
            rows[REACHABLE:] = 0


def make_data(folder: Path) -> None:
    sums = [(f"{a}+{b}=", str(a + b)) for a, b in itertools.product(range(1, 9), range(1, 9))]
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": index},
        }
        for index, (question, answer) in enumerate(sums)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "sums.parquet")
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in sums]
    pandas.DataFrame({"messages": chats}).to_parquet(folder / "chats.parquet")


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())
