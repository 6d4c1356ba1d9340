"""Runs verl's training worker with many settings, and writes how far its gradients are from the oracle's.

Usage: torchrun engines.py ASSETS REPORT, with the CPU support of `launch`. Rank 0 writes JSON: for each case the
largest relative error against the oracle of its estimator over all gradients, and over those of the routers against
conventional training; what is measured; or the error that it was refused with.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import torch
import torch.distributed as dist
import transformers
from tensordict.tensorclass import NonTensorData
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.config import (
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.config.engine import QATEngineConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

from densemixer_adapters.environment import patch_modeling_utils

ON = {"densemixer": True}
MEASURED = {"densemixer": {"metrics": True}}
PACKED = {"attn_implementation": "packed_on_cpu"}  # of `support/cpu_platform`
PADDED = {"use_remove_padding": False}
LORA = {"lora_rank": 4, "lora_alpha": 8}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # override_config, other settings of the model, settings of the engine
    "off": ({}, {}, {}),
    "plain": (ON, {}, {}),
    "padded": (MEASURED, PADDED, {}),
    "no checkpointing": (ON, {"enable_gradient_checkpointing": False}, {}),
    "dynamic batch sizes": (MEASURED, {}, {"use_dynamic_bsz": True, "max_token_len_per_gpu": 40}),
    "packed to buckets": (ON, {}, {"pad_to_length": True, "pad_to_length_bucket": 64}),
    "keep parameters after the forward": (ON, {}, {"reshard_after_forward": False}),
    "reduce every micro-batch": (ON, {}, {"use_no_sync_for_gradient_accumulation": False}),
    "CPU offload": (ON, {}, {"offload_policy": True}),
    "Ulysses": ({**ON, **PACKED}, {}, {"ulysses_sequence_parallel_size": 2}),
    "centered": ({"densemixer": {"estimator": "centered", "metrics": True}}, {}, {}),
    "conventional": ({"densemixer": {"estimator": "conventional", "metrics": True}}, {}, {}),
    "nested": ({"model_config": ON, "attn_implementation": "sdpa"}, {}, {}),
    "LoRA on routers": (ON, {**LORA, "target_parameters": ["mlp.gate.weight"]}, {}),
    "LoRA on routers and experts": (
        ON,
        {**LORA, "target_parameters": ["mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj"]},
        {},
    ),
    "LoRA on all linear layers": (ON, LORA, {}),
    "LoRA off": ({}, LORA, {}),
    "LoRA without routers": (ON, {**LORA, "target_modules": ["q_proj"]}, {}),
    "no experts": (ON, {"path": "dense"}, {}),
    "layers that do not exist": ({"densemixer": {"layers": [7]}}, {}, {}),
    "quantisation-aware": (ON, {}, {"qat": QATEngineConfig(enable=True)}),
    "reference": (ON, {}, {"forward_only": True}),
}


def build(assets: Path, override: dict[str, Any], model: dict[str, Any], engine: dict[str, Any]) -> TrainingWorker:
    model = {"path": "model", **model}
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            **{**model, "path": str(assets / model["path"])},
            override_config={"attn_implementation": "sdpa", **override},
        ),
        engine_config=FSDPEngineConfig(
            **{
                "strategy": "fsdp2",
                "model_dtype": "fp32",
                "mixed_precision": {"param_dtype": "fp32"},
                "use_torch_compile": False,
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": 2,
                "infer_micro_batch_size_per_gpu": 2,
                **engine,
            }
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    worker = TrainingWorker(config=config)
    worker.set_loss_fn(functools.partial(sft_loss, config=None))
    worker.reset()
    return worker


def make_batch(lengths: tuple[int, ...] = (9, 14, 20, 11)) -> Any:
    """Sequences of this rank, of different lengths."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return pack([torch.randint(3, 259, (length,), generator=generator) for length in lengths])


def pack(rows: list[torch.Tensor]) -> Any:
    """As verl's SFT trainer does."""

    def nest(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    tensors = {
        "input_ids": nest(rows),
        "position_ids": nest([torch.arange(len(row)) for row in rows]),
        "loss_mask": nest([(torch.arange(len(row)) > 2).long() for row in rows]),
    }
    settings = {"temperature": 1.0, "global_batch_size": 8, "pad_mode": "no_padding", "pad_token_id": 0}
    data = tu.get_tensordict(tensor_dict=tensors, non_tensor_dict=settings)
    tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=NonTensorData([len(row) for row in rows]))
    return data


def count_layers(model: torch.nn.Module) -> int:
    """That DenseMixer is attached to."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return len(
        {id(hook.__self__) for hook in hooks if type(getattr(hook, "__self__", None)).__name__ == "DenseMixerLayer"}
    )


def worst(gradients: dict[str, Any], truth: dict[str, Any], only: str = "") -> float:
    assert gradients.keys() == truth.keys(), gradients.keys() ^ truth.keys()
    # LoRA's second factor starts at zero, and the first one's gradient with it.
    return max(
        oracle.worst_error(gradients[name], value) if value.any() else float(gradients[name].any())
        for name, value in truth.items()
        if only in name
    )


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of the logger ``densemixer``."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("densemixer").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("densemixer").removeHandler(handler)


def run(assets: Path, override: dict[str, Any], model: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    with heard() as warnings:
        try:
            worker = build(assets, override, model, engine)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        if engine.get("forward_only"):
            return {"layers": count_layers(worker.engine.module)}
        if not model and not engine:
            worker.infer_batch(make_batch())
        output = worker.train_batch(make_batch())
    if dist.get_rank() > 0:
        return {}  # verl collects from the first rank of a group that shares its tokens
    counted = Path(os.environ["RECORDS"]) / "actor-ops-0.jsonl"
    options = override.get(
        "densemixer", override.get("model_config", {}).get("densemixer", {"estimator": "conventional"})
    )
    found = torch.load(Path(os.environ["RECORDS"]) / "actor.pt")
    router, gradients = "mlp.gate", found["gradients"]
    trained = any(router in name for name in gradients)
    estimator = "densemixer" if options is True else options.get("estimator", "densemixer")
    if not trained:
        estimator = "conventional"
    metrics = {name: value for name, value in tu.get(output, "metrics").items() if name.startswith("densemixer/")}
    return {
        "layers": count_layers(worker.engine.module),
        "error against the oracle": worst(gradients, found[estimator]),
        "difference from conventional": worst(gradients, found["conventional"], router) if trained else 0.0,
        "metrics": metrics,
        "warnings": warnings,
        "expected": expected_metrics(found, estimator),
        "operations without gradients": json.loads(counted.read_text()) if counted.exists() else None,
    }


def expected_metrics(found: dict[str, dict[str, torch.Tensor]], estimator: str) -> dict[str, float]:
    added = found.get(f"{estimator} adds")
    if added is None:
        return {}
    total = torch.cat([found[estimator][name].flatten() for name in added])
    extra = torch.cat([gradient.flatten() for gradient in added.values()])
    norms = extra.norm().item(), (total - extra).norm().item()
    return {"router_grad_norm": total.norm().item(), "router_grad_share_unselected": norms[0] / sum(norms)}


def main(assets: Path, report: Path) -> None:
    initialize_global_process_group_ray()
    results = {}
    for name, case in CASES.items():
        folder = [tempfile.mkdtemp(dir=report.parent)]
        dist.broadcast_object_list(folder)
        os.environ["RECORDS"] = folder[0]
        results[name] = run(assets, *case)
        if dist.get_rank() == 0:
            print(name, results[name], flush=True)
            report.write_text(json.dumps(results))
    patch_modeling_utils(transformers.modeling_utils)  # as the boot hook does where the environment asks for it
    os.environ["DENSEMIXER_ENABLED"] = "1"
    frozen = {**LORA, "target_modules": ["q_proj"]}
    for name, override, model in (
        ("environment", {}, {}),
        ("environment, off", {"densemixer": False}, {}),
        ("environment, LoRA without routers", {}, frozen),
    ):
        with heard() as warnings:
            layers = count_layers(build(assets, override, model, {}).engine.module)
        results[name] = {"layers": layers, "warnings": warnings}
    if dist.get_rank() == 0:
        report.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
