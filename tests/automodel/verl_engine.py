"""verl's training worker with the engine ``automodel``, on two FSDP2 ranks, beside the oracle with verl's own loss.

Usage: torchrun verl_engine.py ASSETS REPORT, with the CPU support of tests/verl. Rank 0 writes JSON: for each case the
largest error of all gradients, what is attached and measured, or the error that it was refused with.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import on_cpu  # noqa: F401 - what asks for CUDA gets the CPU
import recorder
import torch
import torch.distributed as dist
from engines import count_layers, heard, make_batch, worst
from nemo_automodel.components.distributed.config import FSDP2Config
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.config import AutomodelEngineConfig, AutomodelOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine.automodel import AutomodelEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

ON = {"densemixer": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # override_config, settings of the engine
    "off": ({}, {}),
    "plain": (ON, {}),
    "centered": ({"densemixer": {"estimator": "centered"}}, {}),
    "checkpointing": (ON, {"activation_checkpointing": True}),
    "measured": ({"densemixer": {"metrics": True}}, {}),
    "reference": (ON, {"forward_only": True}),
    "layers that do not exist": ({"densemixer": {"layers": [7]}}, {}),
    "no experts": ({**ON, "path": "dense"}, {}),
    "own layers, EP 2": (ON, {"ep_size": 2}),
}
BACKEND = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "rope_fusion": False, "experts": "torch"}


def stand_ins() -> None:
    """verl doesn't set the backend of Automodel's meshes, and computes under autocast in bfloat16."""
    host = FSDP2Config.__init__
    FSDP2Config.__init__ = functools.partialmethod(host, backend="gloo")
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore[misc, assignment]


def record(engine: Any) -> None:
    """Write down the first step's gradients, and the oracle's of the same micro-batches."""
    forward, step = engine.forward_step, engine.optimizer_step

    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if hasattr(self, "_recorded") and not forward_only:
            self._recorded.append((micro_batch, loss_function))
        return forward(self, micro_batch, loss_function=loss_function, forward_only=forward_only)

    def optimizer_step(self: Any) -> Any:
        recorded = vars(self).pop("_recorded")
        batches, loss_function = [batch for batch, _ in recorded], recorded[0][1]
        self._is_lora = False
        self._found = {"gradients": {n: recorder.full(p.grad) for n, p in self.module.named_parameters()}}
        for estimator in recorder.ESTIMATORS:
            self._found[estimator] = recorder.oracle_gradients(self, batches, loss_function, estimator)
        return step(self)

    engine.forward_step, engine.optimizer_step = forward_step, optimizer_step


def build(assets: Path, override: dict[str, Any], engine: dict[str, Any]) -> TrainingWorker:
    override = dict(override)
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(assets / override.pop("path", "model")),
            override_config={"attn_implementation": "sdpa", **override},
        ),
        engine_config=AutomodelEngineConfig(
            **{
                "strategy": "automodel",
                "attn_implementation": "sdpa",
                "model_dtype": "fp32",
                "mp_param_dtype": "fp32",
                "mp_output_dtype": "fp32",
                "use_torch_compile": False,
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": 2,
                "backend_config": {**BACKEND, "dispatcher": "torch"},
                **engine,
            }
        ),
        optimizer_config=AutomodelOptimizerConfig(
            lr=1e-3, total_training_steps=1, optimizer="AdamW", optimizer_impl="torch.optim"
        ),
        checkpoint_config=CheckpointConfig(),
    )
    worker = TrainingWorker(config=config)
    worker.set_loss_fn(functools.partial(sft_loss, config=None))
    worker.reset()
    return worker


def run(assets: Path, override: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    with heard() as warnings:
        try:
            worker = build(assets, override, engine)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        model = worker.engine.module
        if engine.get("forward_only"):
            return {"layers": count_layers(model)}
        worker.engine._recorded = []
        lengths = (8, 13, 17, 6) if dist.get_rank() else (9, 14, 20, 11)  # ranks have different numbers of tokens
        output = worker.train_batch(make_batch(lengths))
    found = worker.engine._found
    options = override.get("densemixer", {"estimator": "conventional"})
    estimator = "densemixer" if options is True else options.get("estimator", "densemixer")
    metrics = tu.get(output, "metrics") if dist.get_rank() == 0 else {}
    return {
        "layers": count_layers(model),
        "names": sorted(model.state_dict()),
        "error against the oracle": worst(found["gradients"], found[estimator]),
        "difference from conventional": worst(found["gradients"], found["conventional"], "mlp.gate"),
        "loss": float(torch.tensor(metrics["loss"]).mean()) if metrics else None,
        "metrics": {name: value for name, value in metrics.items() if name.startswith("densemixer/")},
        "ours in its configuration": "densemixer" in str(model.config.to_dict()).lower(),
        "warnings": warnings,
    }


def main(assets: Path, report: Path) -> None:
    os.environ["RECORDS"] = tempfile.mkdtemp()
    stand_ins()
    record(AutomodelEngineWithLMHead)
    initialize_global_process_group_ray()
    results = {}
    for name, case in CASES.items():
        results[name] = run(assets, *case)
        if dist.get_rank() == 0:
            print(name, results[name], flush=True)
            report.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
