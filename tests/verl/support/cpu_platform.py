"""Test support: verl on a machine without a GPU.

Loaded in every process of verl through ``VERL_USE_EXTERNAL_MODULES``; chosen with ``VERL_PLATFORM=cpu`` and
``VERL_ENGINE_DEVICE=cuda``. It registers a platform, which is verl's extension point for new hardware, and fills in
four places that verl 0.9.1 has no extension point for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed.fsdp
import transformers
import transformers.masking_utils
import transformers.modeling_flash_attention_utils
from torch import Tensor
from transformers.integrations import flash_attention
from verl.plugin.platform import PlatformBase, PlatformRegistry


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def zero(*args: Any, **kwargs: Any) -> int:
    return 0


class CpuDevice(ModuleType):
    """What ``torch.cuda`` is on other machines."""

    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: "cpu")
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda device=None: "cpu")
    mem_get_info = staticmethod(lambda device=None: (1 << 34, 1 << 34))
    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = staticmethod(zero)
    set_device = synchronize = empty_cache = ipc_collect = reset_peak_memory_stats = staticmethod(nothing)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    Stream, stream, current_stream = torch.cpu.Stream, torch.cpu.stream, torch.cpu.current_stream


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = CpuDevice("cpu_device")

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # only on request

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"  # Ray is started with a declared number of them, so verl's own placement works unchanged

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed
    set_device = synchronize = empty_cache = set_allocator_settings = nothing
    profiler_start = profiler_stop = cudart = nothing

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield


def accept_cpu_twice() -> None:
    """verl asks for the backend "cpu:gloo,DEVICE:…", which names the CPU twice here."""
    original = torch.distributed.init_process_group

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(backend, str):
            backend = ",".join(dict.fromkeys(backend.split(",")))
        return original(backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


def never_pin_memory() -> None:
    """verl pins the memory of reference policies under FSDP2, which needs CUDA."""
    original = torch.distributed.fsdp.CPUOffloadPolicy
    torch.distributed.fsdp.CPUOffloadPolicy = lambda pin_memory=True: original(pin_memory=False)


def use_sdpa_in_critics() -> None:
    """verl loads critics with flash attention, whatever the configuration says."""
    auto = transformers.AutoModelForTokenClassification
    original = auto.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "attn_implementation": "sdpa"})

    auto.from_pretrained = from_pretrained


def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, position_ids: Tensor, **kwargs: Any) -> Tensor:
    """Flash attention for packed sequences, [1, tokens, heads, head size]; the positions of each start at 0."""
    sequence = (position_ids == 0).cumsum(-1)
    before = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
    mask = before & (sequence[:, None, :] == sequence[:, :, None])
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None], scale=kwargs["softmax_scale"], enable_gqa=True
    )
    return output.transpose(1, 2)


def flash_attention_on_the_cpu() -> None:
    """Ulysses is built around flash attention: an attention of that interface, `attn_implementation=packed_on_cpu`."""
    transformers.AttentionInterface.register("packed_on_cpu", flash_attention.flash_attention_forward)
    transformers.AttentionMaskInterface.register("packed_on_cpu", transformers.masking_utils.flash_attention_mask)
    # Where verl takes it from, to put its exchange of heads and tokens around it.
    transformers.modeling_flash_attention_utils._flash_attention_forward = attend
    flash_attention._flash_attention_forward = attend


accept_cpu_twice()
never_pin_memory()
use_sdpa_in_critics()
flash_attention_on_the_cpu()
