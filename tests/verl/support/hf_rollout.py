"""Test support: a rollout engine for verl that generates with transformers, in place of vLLM or SGLang.

Loaded in every process of verl through ``VERL_USE_EXTERNAL_MODULES``; chosen with ``rollout.name=hf``. Its weights come
from the trainer alone. What it samples depends on the weights and on the prompt, on nothing else, so two runs with the
same weights have the same rollouts, up to the order of those of one prompt.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry


class Server:
    """A Ray actor that holds the model."""

    def __init__(self, config: Any, model_config: Any) -> None:
        from transformers import AutoConfig

        torch.set_num_threads(1)
        self.response_length = config["response_length"]
        self.hf_config = AutoConfig.from_pretrained(model_config["path"])
        self.model: Any = None
        self.step: int | None = None
        self.lock = asyncio.Lock()
        self.requests: collections.Counter[tuple[int, ...]] = collections.Counter()

    async def load_weights(self, weights: dict[str, Any], global_steps: int | None = None) -> None:
        from transformers import AutoModelForCausalLM

        model_class = AutoModelForCausalLM._model_mapping[type(self.hf_config)]
        state = {name: torch.as_tensor(weight) for name, weight in weights.items()}
        with (Path(os.environ["RECORDS"]) / f"sync-{os.getpid()}.jsonl").open("a") as file:
            print(json.dumps({name: list(weight.shape) for name, weight in state.items()}), file=file)
        self.model, report = model_class.from_pretrained(
            None, config=self.hf_config, state_dict=state, output_loading_info=True, dtype=torch.float32
        )
        assert not report["missing_keys"], report
        assert not report["unexpected_keys"], report
        self.model.eval()
        self.step = self.step if global_steps is None else global_steps
        self.requests.clear()

    async def generate(self, request_id: str, prompt_ids: Any, sampling_params: Any, **ignored: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        prompt = tuple(prompt_ids)
        number = self.requests[prompt]
        self.requests[prompt] += 1
        async with self.lock:
            tokens, log_probs = await asyncio.to_thread(self.sample, prompt, number, dict(sampling_params))
        return TokenOutput(
            token_ids=tokens,
            log_probs=log_probs if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            num_preempted=0,
            extra_fields={"global_steps": self.step},
        )

    @torch.no_grad()
    def sample(self, prompt: tuple[int, ...], number: int, parameters: dict[str, Any]) -> tuple[list[int], list[float]]:
        from transformers import GenerationConfig

        temperature = parameters.get("temperature", 1.0)
        settings = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_p=parameters.get("top_p", 1.0),
            top_k=0,
            max_new_tokens=parameters.get("max_tokens") or self.response_length,
            eos_token_id=self.hf_config.eos_token_id,
            pad_token_id=self.hf_config.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = torch.tensor([prompt])
        torch.manual_seed(zlib.crc32(repr((prompt, number)).encode()))
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        tokens = out.sequences[0, len(prompt) :].tolist()
        rows = torch.cat(out.logits).float().div(temperature).log_softmax(-1)
        return tokens, [row[token].item() for row, token in zip(rows, tokens, strict=True)]

    async def set_global_steps(self, step: int) -> None:
        self.step = step

    async def nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = nothing


def load_replica_class() -> Any:
    import ray
    from verl.workers.rollout.replica import RolloutReplica

    class Replica(RolloutReplica):
        async def launch_servers(self) -> None:
            name = f"hf_server_{self.replica_rank}"
            options = ray.remote(Server).options(name=name, num_cpus=0, max_concurrency=64)
            server = options.remote(config=dict(self.config), model_config=dict(self.model_config))
            self.servers, self._server_handle, self._server_address = [server], server, name

    return Replica


_ROLLOUT_REGISTRY["hf", "async"] = "hf_rollout_adapter.ServerAdapter"
RolloutReplicaRegistry.register("hf", load_replica_class)
