"""Tests on several processes that are forked from one, which has imported what takes long."""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist


def join(rank: int, processes: int, store: str, seconds: int = 60) -> None:
    """Make this process one of the gloo group that meets at the file ``store``."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=seconds),
    )


def of_all_ranks(result: Any) -> list[Any]:
    """What each rank has, in their order. Collective."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    return results
