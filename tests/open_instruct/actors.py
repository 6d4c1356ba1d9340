"""Trains in a Ray actor, as open-instruct's `grpo_fast.py` does. Usage: actors.py MODEL_FOLDER BATCH OUTPUT."""

from __future__ import annotations

import os
import sys

import ray
import torch


@ray.remote
class PolicyTrainer:
    def from_pretrained(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    def step(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


if __name__ == "__main__":
    folder, batch, output = sys.argv[1:]
    ray.init(runtime_env={"env_vars": dict(os.environ)}, num_cpus=1, include_dashboard=False)
    trainer = PolicyTrainer.remote()
    ray.get(trainer.from_pretrained.remote(folder))
    torch.save(ray.get(trainer.step.remote(torch.load(batch))), output)
