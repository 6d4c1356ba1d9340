"""SFT with TRL: LoRA on attention, experts and routers, and the routers learn from all experts.

accelerate launch sft_lora.py --output_dir out [more options of TRL's SFTConfig]
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from densemixer_adapters.transformers import apply_densemixer


@dataclasses.dataclass
class Example:
    model: str = "Qwen/Qwen3-30B-A3B"
    data: str = dataclasses.field(
        default="trl-lib/Capybara", metadata={"help": "name on the hub, or JSON file, with a column `messages`"}
    )


def main(example: Example, config: SFTConfig) -> None:
    own = Path(example.data).is_file()
    data = load_dataset("json", data_files=example.data) if own else load_dataset(example.data)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(example.model, dtype=dtype)

    handle = apply_densemixer(model)  # the one line

    # The routers must be among the targets: they are what DenseMixer trains. Weights that are no nn.Linear, as those of
    # routers and experts, are `target_parameters`.
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=data["train"],
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(example.model),
    )
    print(f"DenseMixer trains the routers of {sum(not layer.router_is_frozen for layer in handle.layers)} layers")
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*HfArgumentParser((Example, SFTConfig)).parse_args_into_dataclasses())
