"""Runs Automodel's fine-tuning recipe on a machine without a GPU: what asks for CUDA gets the CPU.

Usage: python on_cpu.py -c tiny.yaml [--SECTION.KEY VALUE]..., as Automodel's own command takes them; under torchrun on
several processes. Nothing of layers, routing, parallelism or the training loop is replaced. For trying it out only.
"""

from __future__ import annotations

import importlib
import os
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

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class TorchOfCpu(types.ModuleType):
    """torch, but that its devices are CPUs."""

    cuda = CudaOfCpu("torch.cuda")

    @staticmethod
    def device(kind: Any, index: Any = None) -> torch.device:
        return torch.device("cpu" if str(kind).startswith("cuda") else kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Automodel compiles its activations, for minutes each on a CPU
for module in map(importlib.import_module, MODULES):
    module.torch = TorchOfCpu("torch")  # type: ignore[attr-defined]


def main() -> None:
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    recipe = TrainFinetuneRecipeForNextTokenPrediction(parse_args_and_load_config("tiny.yaml"))
    recipe.setup()
    recipe.run_train_validation_loop()


if __name__ == "__main__":
    main()
