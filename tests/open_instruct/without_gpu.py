"""Runs a module of open-instruct that logs how well it uses its GPU, where there is none. That is all it changes."""

import runpy
import sys
import types

import torch
from open_instruct import utils

utils.ModelDims.device_flops = 1e12
torch.cuda.current_device = lambda: 0
torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *args, **kwargs: 0
torch.cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(total_memory=2**34)
runpy.run_module(f"open_instruct.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
