from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_process() -> Iterator[None]:
    """Megatron's process groups in a world of one process, which is this one."""
    import cpu  # noqa: F401
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    dist.destroy_process_group()
