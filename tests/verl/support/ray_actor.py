"""Trains one step in Ray actors, without a word about DenseMixer but to switch it off in the second one.

Usage: ray_actor.py MODEL REPORT. For each actor, the norms of a router's gradient by expert, as JSON.
"""

import json
import sys
import tempfile
from pathlib import Path

import ray


@ray.remote
class Trainer:
    def train(self, folder: str) -> list[float]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder).train()
        tokens = torch.arange(24).reshape(2, 12)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return model.model.layers[0].mlp.gate.weight.grad.norm(dim=-1).tolist()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # sockets have short paths
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=short)
        off = Trainer.options(runtime_env={"env_vars": {"DENSEMIXER_ENABLED": "0"}})
        actors = [Trainer.remote(), off.remote()]
        Path(sys.argv[2]).write_text(json.dumps(ray.get([actor.train.remote(sys.argv[1]) for actor in actors])))
        ray.shutdown()
