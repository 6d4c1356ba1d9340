"""Where the tests' models live: on the CPU, or with TEST_DEVICE=cuda on a GPU, as `ci/gpu.py` says."""

from __future__ import annotations

import os

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
BACKEND = "nccl" if DEVICE == "cuda" else "gloo"
"""Of torch.distributed."""
