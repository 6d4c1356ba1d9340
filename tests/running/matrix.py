"""The matrix: ways of running, the variations of each, and the script that runs them."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPORTS = HERE.parents[1] / "outputs" / "running"

CHECKPOINTING = ("checkpointing non-reentrant", "checkpointing reentrant", "checkpointing selective")
COMMON = ("plain", "gradient accumulation", *CHECKPOINTING)
FSDP = (*COMMON, "routers and experts wrapped", "gpt-oss")
HALF = ("plain", "checkpointing non-reentrant")
TRAINER = ("plain", "gradient accumulation", "checkpointing")

MATRIX: dict[str, dict[str, tuple[str, ...]]] = {
    "one_process": {
        "one process": (*COMMON, "activations on the CPU", "DeepSeek-V3"),
        "bfloat16": HALF,
        "autocast bfloat16": HALF,
        "autocast float16, GradScaler": HALF,
        "torch.compile": (
            "plain",
            "fullgraph after a step without",
            *CHECKPOINTING[:2],
            "inductor by layers",
            "gpt-oss by layers",
        ),
        "Trainer": TRAINER,
        "SFTTrainer": (*TRAINER, "packing"),
        "DPOTrainer": TRAINER,
        "GRPOTrainer": TRAINER,
    },
    "liger": {"Liger": ("all but RMSNorm", "applied before the model is made")},
    "two_ranks": {
        "DDP": (*COMMON, "static graph", "find unused parameters"),
        "FSDP1, use_orig_params=True": (*FSDP, "SHARD_GRAD_OP"),
        "FSDP1, use_orig_params=False": (*FSDP, "SHARD_GRAD_OP"),
        "FSDP1, bfloat16": ("plain",),
        "FSDP2, reshard_after_forward=True": (*FSDP, "attached after it", "CPU offload"),
        "FSDP2, reshard_after_forward=False": (*FSDP, "attached after it", "CPU offload"),
        "FSDP2, bfloat16": HALF,
        "FSDP2 of transformers (fsdp_size)": ("plain",),
        "ZeRO-1": COMMON,
        "ZeRO-2": (*COMMON, "optimizer on the CPU"),
        "ZeRO-3": (
            *COMMON,
            "optimizer on the CPU",
            "parameters on the CPU",
            "without leaf modules",
            "gpt-oss",
            "through accelerate",
            "through the Trainer",
        ),
        "refused": ("tensor parallelism", "expert parallelism"),
    },
}
# The layouts of transformers' own parallelism, which only the newer version has; what else is to be shown in each.
_KINDS = CHECKPOINTING[:2]
_DOORS = ("budget", "DENSEMIXER_ENABLED=1", "router metrics", "saved checkpoints", "changed output")
PARALLEL: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "FSDP 2 · EP 2": (
        {"fsdp_size": 2, "ep_size": 2},
        (
            "plain",
            "centered",
            *_KINDS,
            "gpt-oss",
            "DeepSeek-V3",
            "Qwen2-MoE",
            "Mixtral",
            "ep_implementation all_to_all",
            "batches of different lengths",
            "a hook on one rank",
            "beside a model of another layout",
            "torch.compile",
            "LoRA on attention and routers",
            "bfloat16",
            *_DOORS,
            "Trainer",  # on a CPU, accelerate refuses tensor parallelism
            "SFTTrainer",
            "refused: pipeline parallelism",
            "refused: kernels of Mega MoE",
            "refused: a part of a model",
            "PEFT's error: experts",
            "PEFT's error: routers in full",
        ),
    ),
    "FSDP 2": (
        {"fsdp_size": 2},
        ("LoRA on attention and routers", "LoRA on routers and experts", "PEFT's error: routers in full"),
    ),
    "TP 2 · EP 2": (
        {"tp_size": 2, "ep_size": 2},
        (
            "plain",
            *_KINDS,
            "DeepSeek-V3",
            "ep_implementation all_to_all",
            "ep_implementation all_reduce",
            "LoRA on attention and routers",
            "LoRA with routers in full",
            *_DOORS,
            "PEFT's error: experts",
        ),
    ),
    "TP 2": (
        {"tp_size": 2},
        (
            "plain",
            "centered",
            *_KINDS,
            "DeepSeek-V3",
            "Qwen2-MoE",
            "gpt-oss",
            "torch.compile",
            "LoRA on attention and routers",
            "LoRA with routers in full",
            *_DOORS,
            "PEFT's error: experts",
            "PEFT's error: down_proj of experts",
            "PEFT's error: o_proj",
        ),
    ),
    "FSDP 4 · EP 2": ({"fsdp_size": 4, "ep_size": 2}, ("plain", "gpt-oss")),
    "FSDP 4 · EP 4": ({"fsdp_size": 4, "ep_size": 4}, ("plain",)),
    "FSDP 2 · TP 2": ({"fsdp_size": 2, "tp_size": 2}, ("plain", "checkpointing non-reentrant")),
    "FSDP 2 · TP 2 · EP 2": (
        {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
        ("plain", "ep_implementation all_reduce", "LoRA on routers", "PEFT's error: attention"),
    ),
    "FSDP 2 · TP 2 · EP 4": (
        {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
        (
            "plain",
            "checkpointing reentrant",
            "gpt-oss",
            "batches of different lengths",
            "router metrics",
            "saved checkpoints",
        ),
    ),
    "HSDP 2 × 2 · EP 2": ({"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}, ("plain",)),
    "HSDP 2 × 1 · TP 2 · EP 2": ({"dp_replicate_size": 2, "tp_size": 2, "ep_size": 2}, ("plain",)),
}


NO_GRADIENTS = (
    "bfloat16",
    "budget",
    "router metrics",
    "saved checkpoints",
    "changed output",
    "refused",
    "PEFT's error",
)
"""How the names of the variations begin that show something else than gradients in float32."""


def processes(layout: dict[str, int]) -> int:
    return math.prod(size for name, size in layout.items() if name != "ep_size")


SETTINGS: dict[str, dict[str, Any]] = {
    # Triton's kernels run on the CPU, without timing them for the best settings first.
    "liger": {"TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"},
    "parallel": {"DENSEMIXER_ENABLED": "1"},
}
NOT_IN = {
    "5.5.4": {"FSDP2 of transformers (fsdp_size): plain"},
    "5.24.0": {"refused: tensor parallelism", "refused: expert parallelism"},
}


def cells(script: str, version: str) -> list[str]:
    names = [f"{way}: {variation}" for way, variations in MATRIX[script].items() for variation in variations]
    return [name for name in names if name not in NOT_IN.get(version, ())]


def installed() -> str:
    return importlib.metadata.version("transformers")


def parallel_cells() -> list[str]:
    return [f"{way}: {variation}" for way, (_, variations) in PARALLEL.items() for variation in variations]


def report_of(script: str, version: str) -> Path:
    return REPORTS / f"{version}-{script}.json"


def _ranks() -> int:
    """Two; on GPUs as many as there are of them, if there is only one."""
    import torch
    from device import DEVICE

    return min(2, torch.cuda.device_count()) if DEVICE == "cuda" else 2


def run(script: str, cells: Collection[str] = ()) -> dict[str, Any]:
    """Run cells of a script of this folder, by default all of them. It leaves its report in ``outputs/running``."""
    from ranks import run_script  # not there where `matrix_table` alone runs

    report = report_of(script, installed())
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    settings = {"ranks": _ranks() if script == "two_ranks" else 0, **SETTINGS.get(script, {})}
    found: dict[str, Any] = run_script(HERE / f"{script}.py", report, *cells, **settings)
    return found
