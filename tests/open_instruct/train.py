"""A training script that knows nothing of DenseMixer, and loads and trains as open-instruct's `finetune.py` does.

Usage: accelerate launch train.py --model_name_or_path FOLDER --batch FILE --output FILE [--use_lora]. It takes one step
of SGD, and saves by how much each weight changed for a learning rate of one: its gradient.
"""

from __future__ import annotations

import argparse
import logging

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import get_z3_leaf_modules
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

STEP = 1024.0  # large, so that the weight before it hardly rounds the gradient away


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.WARNING)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype=torch.float32)
    embeddings = model.get_input_embeddings()
    with deepspeed.zero.GatheredParameters(embeddings.weight, modifier_rank=None):
        assert len(embeddings.weight) == config.vocab_size
    leaves = len(get_z3_leaf_modules(model))
    if args.use_lora:
        targets = ["q_proj", "o_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=targets))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loader = DataLoader([{"input_ids": row, "labels": row} for row in torch.load(args.batch)], batch_size=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=STEP)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:  # one for each rank
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
    model = accelerator.unwrap_model(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if accelerator.is_main_process:
            changes = {name: (before[name] - value.detach()) / STEP for name, value in model.named_parameters()}
            torch.save({"gradients": changes, "leaves": leaves}, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--model_name_or_path", "--batch", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--use_lora", action="store_true")
    main(parser.parse_args())
