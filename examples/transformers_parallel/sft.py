"""SFT of a whole model that transformers spreads over ranks (FSDP, TP, EP), where the routers learn from all experts.

torchrun --standalone --nproc-per-node 8 sft.py --fsdp_size 8 --ep_size 8 --output_dir out [more of TRL's SFTConfig]
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

from densemixer_adapters.callback import DenseMixerCallback
from densemixer_adapters.transformers import apply_densemixer


@dataclasses.dataclass
class Example:
    model: str = "Qwen/Qwen3-30B-A3B"
    data: str = dataclasses.field(
        default="trl-lib/Capybara", metadata={"help": "name on the hub, or JSON file, with a column `messages`"}
    )
    fsdp_size: int = 1
    tp_size: int = 1
    ep_size: int = 1


def main(example: Example, config: SFTConfig) -> None:
    own = Path(example.data).is_file()
    data = load_dataset("json", data_files=example.data) if own else load_dataset(example.data)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    spread = DistributedConfig(fsdp_size=example.fsdp_size, tp_size=example.tp_size, ep_size=example.ep_size)
    model = AutoModelForCausalLM.from_pretrained(example.model, dtype=dtype, distributed_config=spread)

    handle = apply_densemixer(model)  # the one line

    config.save_only_model = True  # transformers can't resume such a model
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=data["train"],
        processing_class=AutoTokenizer.from_pretrained(example.model),
        callbacks=[DenseMixerCallback()],  # router metrics in the log
    )
    if trainer.is_world_process_zero():
        print(f"DenseMixer trains the routers of {len(handle.layers)} layers")
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*HfArgumentParser((Example, SFTConfig)).parse_args_into_dataclasses())
