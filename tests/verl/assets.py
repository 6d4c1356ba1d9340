"""A tiny Qwen3-MoE with a byte tokenizer, arithmetic prompts, and conversations for SFT, all made here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pandas
import tiny_models
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeForTokenClassification

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
    tiny_models.make_half_unreachable(half_dead)
    dense = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**half_dead.config.to_dict(), "mlp_only_layers": [0, 1]}))
    model = make_model(tokenizer)
    critic = Qwen3MoeForTokenClassification(Qwen3MoeConfig(**{**model.config.to_dict(), "num_labels": 1}))
    critic.model.load_state_dict(model.model.state_dict())
    for name, variant in {"model": model, "half_dead": half_dead, "dense": dense, "critic": critic}.items():
        variant.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_tokenizer() -> Any:
    return tiny_models.byte_tokenizer(TEMPLATE)


def make_model(tokenizer: Any) -> Any:
    return tiny_models.qwen3_moe(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


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
