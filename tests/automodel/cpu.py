"""Automodel on a machine without a GPU: what asks for CUDA gets the CPU. Import it before any model is built.

Nothing of layers, routing, parallelism or the training loop is replaced.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch

MODULES = (
    "nemo_automodel._transformers.auto_model",
    "nemo_automodel.components.models.qwen3_moe.model",
    "nemo_automodel.recipes.llm.train_ft",
)
"""Those that build devices of CUDA by themselves."""


class CudaOfCpu(types.ModuleType):
    """What ``torch.cuda`` is asked for there."""

    current_device = staticmethod(lambda: torch.device("cpu"))
    max_memory_allocated = staticmethod(lambda: 0)
    is_available = staticmethod(lambda: False)
    reset_peak_memory_stats = empty_cache = synchronize = staticmethod(lambda *args: None)


class TorchOfCpu(types.ModuleType):
    """torch, but that its devices are CPUs."""

    cuda = CudaOfCpu("torch.cuda")

    @staticmethod
    def device(kind: Any, index: int | None = None) -> torch.device:
        return torch.device("cpu" if str(kind).startswith("cuda") else kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


for module in map(importlib.import_module, MODULES):
    module.torch = TorchOfCpu("torch")  # type: ignore[attr-defined]
