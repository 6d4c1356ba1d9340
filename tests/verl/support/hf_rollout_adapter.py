"""Test support: the half of the rollout in `hf_rollout` that lives in the trainer's workers."""

from __future__ import annotations

import os
from typing import Any

import ray
from verl.workers.rollout.base import BaseRollout


class ServerAdapter(BaseRollout):
    def __init__(self, config: Any, model_config: Any, device_mesh: Any = None, **ignored: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        self.replica, self.part = divmod(int(os.environ["RANK"]), size)

    @property
    def server(self) -> Any:
        return ray.get_actor(f"hf_server_{self.replica}")

    async def resume(self, tags: Any) -> None:
        await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        await self.server.sleep.remote()

    async def update_weights(self, weights: Any, global_steps: int | None = None, **ignored: Any) -> None:
        # Reading a weight may be collective, so all ranks do.
        state = {name: weight.detach().float().cpu().numpy().copy() for name, weight in weights}
        if self.part == 0:
            await self.server.load_weights.remote(state, global_steps=global_steps)
