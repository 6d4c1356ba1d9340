import os
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


@pytest.fixture
def deterministic() -> Iterator[None]:
    """For bitwise comparisons: the host's batched_mm sums expert gradients in an order that varies between runs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
