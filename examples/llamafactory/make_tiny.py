"""Make a tiny Qwen3-MoE checkpoint with random weights, a tokenizer and two data sets: all that the YAMLs need offline.

    python make_tiny.py tiny      # or `tiny 128`: that many experts
    llamafactory-cli train full_sft.yaml $(cat tiny/sft)

The files ``tiny/sft``, ``tiny/dpo``, ``tiny/v1`` and ``tiny/swift`` (for ms-swift) hold what to override in a YAML for
it to run on a CPU in seconds.
The examples of TRL, FSDP2, Axolotl and ms-swift use ``tiny/model`` and what is in ``tiny/data``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

REJECTED = ("rejected", "rejected_response")
"""What LLaMA-Factory's configuration below calls a rejected answer, and what ms-swift does."""


def make_rows(count: int) -> list[dict[str, str]]:
    pairs = [(random.randint(0, 50), random.randint(0, 50)) for _ in range(count)]
    return [{"instruction": f"Add {a} and {b}.", "input": "", "output": f"The sum is {a + b}."} for a, b in pairs]


def make_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(row.values()) for row in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHAT
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, experts: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


def main(folder: Path, experts: int = 8) -> None:
    random.seed(0)
    torch.manual_seed(0)
    rows = make_rows(64)
    tokenizer = make_tokenizer(rows)
    model, data = folder / "model", folder / "data"
    tokenizer.save_pretrained(model)
    make_model(tokenizer, experts).save_pretrained(model)

    data.mkdir(exist_ok=True)
    (data / "sft.json").write_text(json.dumps(rows))
    chats = [
        [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}] for r in rows
    ]
    (data / "chat.json").write_text(json.dumps([{"messages": chat} for chat in chats]))
    pairs = [{**row, "chosen": row["output"], **dict.fromkeys(REJECTED, "I do not know.")} for row in rows]
    (data / "dpo.json").write_text(json.dumps(pairs))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {"sft": {"file_name": "sft.json"}, "dpo": {"file_name": "dpo.json", "ranking": True, "columns": columns}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    (data / "v1.yaml").write_text(f"sft: {{path: {data / 'sft.json'}, source: local, converter: alpaca}}\n")

    common = "bf16=false cutoff_len=128 max_steps=3 logging_steps=1"
    for name in ("sft", "dpo"):
        (folder / name).write_text(
            f"model_name_or_path={model} dataset_dir={data} dataset={name} template=qwen {common} "
            "per_device_train_batch_size=4 gradient_accumulation_steps=1 learning_rate=0.001\n"
        )
    (folder / "swift").write_text(
        f"--model {model} --model_type qwen3_moe --dataset {data / 'sft.json'} --template default --use_hf true "
        "--torch_dtype float32 --attn_impl sdpa --max_length 128 --max_steps 2 --gradient_accumulation_steps 1 "
        "--save_strategy no\n"
    )
    (folder / "v1").write_text(
        f"model={model} train_dataset={data / 'v1.yaml'} {common} micro_batch_size=4 batching_workers=0\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *map(int, sys.argv[2:]))
