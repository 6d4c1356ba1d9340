"""Runs verl's training worker with its engine ``veomni`` on two ranks, and writes what it found, as JSON.

Usage: torchrun engine.py ASSETS REPORT, with the CPU support of tests/verl. For each case: the largest error of a
gradient against the oracle, the difference of the routers' from conventional training, what is measured, how it
compares with the same case without DenseMixer; or the error that it was refused with.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import oracle
import stand_ins

stand_ins.install()

import small_models  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from engines import pack  # noqa: E402  # of tests/verl
from small_models import FAMILIES, Gradients, apart, full, gradients_of, worst  # noqa: E402
from veomni.distributed import parallel_state  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.distributed import initialize_global_process_group_ray  # noqa: E402
from verl.workers.config import (  # noqa: E402
    HFModelConfig,
    TrainingWorkerConfig,
    VeOmniEngineConfig,
    VeOmniOptimizerConfig,
)
from verl.workers.config.engine import EngineRouterReplayConfig  # noqa: E402
from verl.workers.engine.veomni import transformer_impl  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.utils.losses import sft_loss  # noqa: E402

from densemixer_adapters.transformers import attached_layers  # noqa: E402

ON = {"densemixer": True}
SPREAD = {"expert_parallel_size": 2, "moe_implementation": stand_ins.FUSED}
REPLAY = {**SPREAD, "router_replay": EngineRouterReplayConfig(mode="R2")}
PACKED = {"use_remove_padding": True}
CRITIC = {"path": "critic", "kind": "value_model"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # override_config, other settings of the model, settings of the engine
    "EP 1, off": ({}, {}, {}),
    "EP 1": (ON, {}, {}),
    "EP 2, off": ({}, {}, SPREAD),
    "EP 2": (ON, {}, SPREAD),
    "EP 2, no checkpointing": (ON, {"enable_gradient_checkpointing": False}, SPREAD),
    "EP 2, centered": ({"densemixer": {"estimator": "centered", "metrics": True}}, {}, SPREAD),
    "EP 1, critic": (ON, CRITIC, {}),
    "EP 2, router replay": ({"densemixer": {"metrics": True}}, PACKED, REPLAY),
    "reference": (ON, {}, {**SPREAD, "forward_only": True}),
    "LoRA": (ON, {"lora_rank": 4}, {}),
    "LoRA, off": ({}, {"lora_rank": 4}, {}),
    "quantisation-aware": (ON, {}, {"qat_implementation": "fp8_blockwise"}),
    "no experts": (ON, {"path": "dense"}, {}),
}


def build(assets: Path, override: dict[str, Any], model: dict[str, Any], engine: dict[str, Any]) -> TrainingWorker:
    model = {"path": "model", "kind": "language_model", "use_remove_padding": False, **model}
    forget_the_last_layout()
    config = TrainingWorkerConfig(
        model_type=model.pop("kind"),
        model_config=HFModelConfig(
            **{**model, "path": str(assets / model["path"])},
            override_config={"attn_implementation": "eager", **override},
        ),
        engine_config=VeOmniEngineConfig(
            **{
                "mixed_precision": True,
                "use_torch_compile": False,
                "attn_implementation": "eager",
                "moe_implementation": "eager",
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": 2,
                "infer_micro_batch_size_per_gpu": 2,
                **engine,
            }
        ),
        optimizer_config=VeOmniOptimizerConfig(lr=1e-3, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    worker = TrainingWorker(config=config)
    worker.set_loss_fn(squares if config.model_type == "value_model" else functools.partial(sft_loss, config=None))
    worker.reset()
    return worker


def squares(model_output: Any, data: Any, dp_group: Any = None, **rest: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """A loss for values."""
    return model_output["values"].values().square().mean(), {}


def in_float32() -> None:
    """The engine knows bfloat16 weights, or a bfloat16 forward."""
    impl: Any = transformer_impl
    impl.MixedPrecisionConfig = functools.partial(impl.MixedPrecisionConfig, param_dtype="float32")
    impl.VeOmniEngine._autocast_dtype = torch.float32


def forget_the_last_layout() -> None:
    """VeOmni keeps the first one of a process. The groups of processes it keeps apart, for the next one like it."""
    parallel_state._PARALLEL_STATE = None
    parallel_state._PARALLEL_STATE_REGISTRY.clear()


class Truth:
    """Runs each of an engine's micro-batches on models with the oracle, before the engine runs its own."""

    def __init__(self, engine: Any, estimators: set[str]) -> None:
        self.engine = engine
        self.models = {kind: self.build(kind) for kind in estimators}
        self.step, engine.forward_step = engine.forward_step, self.forward_step

    def build(self, estimator: str) -> Any:
        engine = self.engine
        # Of the same kernels: which they are, VeOmni keeps once for all models of an architecture.
        own = engine._get_model_config_path(), Path(engine.model_config.local_path)
        model = small_models.load(*own, engine.engine_config.moe_implementation)
        return small_models.make_dense(model, FAMILIES["qwen3_moe"], estimator)

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        for model in () if forward_only else self.models.values():
            live, self.engine.module = self.engine.module, model
            with oracle.Float64():
                loss, _ = self.step(micro_batch, loss_function=loss_function, forward_only=False)
                loss.backward()
            self.engine.module = live
        return self.step(micro_batch, loss_function=loss_function, forward_only=forward_only)

    def gradients(self, estimator: str) -> Gradients:
        """Averaged over the ranks. Collective."""
        found = {name: gradient.clone() for name, gradient in gradients_of(self.models[estimator]).items()}
        for gradient in found.values():
            dist.all_reduce(gradient)
        return {name: gradient / dist.get_world_size() for name, gradient in found.items()}


def make_batch(replays: bool) -> Any:
    """Four sequences a rank, of different lengths."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    lengths = (9, 14, 20, 11) if dist.get_rank() else (8, 13, 17, 6)
    data = pack([torch.randint(3, 259, (length,), generator=generator) for length in lengths])
    if replays:
        tu.assign_non_tensor(data, enable_routing_replay=True)
    return data


def exported(engine: Any) -> tuple[list[str], torch.Tensor]:
    """The names of the weights that go to the rollout, and these."""
    names, values = [], []
    for name, value in engine.get_per_tensor_param()[0]:
        names.append(name)
        values.append(value.flatten().float().clone())
    return names, torch.cat(values)


def run(override: dict[str, Any], model: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    worker = build(Path(sys.argv[1]), override, model, engine)
    layers = len(attached_layers(worker.engine.module))
    replays, values = "router_replay" in engine, model.get("kind") == "value_model"
    inferred = worker.infer_batch(make_batch(replays))
    found: dict[str, Any] = {"layers": layers, "config": "densemixer" in worker.engine.module.config.to_dict()}
    found["inferred"] = inferred["values" if values else "log_probs"].values()
    if engine.get("forward_only"):
        return found
    found["exported"] = exported(worker.engine)
    data = make_batch(replays)
    if replays:  # each token to the expert after the one that was recorded
        routed = inferred["routed_experts"]
        shifted = (routed.values().long() + 1) % 8
        data["routed_experts"] = torch.nested.nested_tensor_from_jagged(shifted, routed.offsets())
    options = override.get("densemixer", {"estimator": "conventional"})
    estimator = "densemixer" if options is True else options.get("estimator", "densemixer")
    truth = Truth(worker.engine, {estimator, "conventional"})
    step = worker.engine.optimizer_step

    def optimizer_step() -> Any:
        ours = {name: parameter.grad for name, parameter in worker.engine.module.named_parameters()}
        found["gradients"] = full(ours, parallel_state.get_parallel_state())
        found["error"] = worst(found["gradients"], truth.gradients(estimator))
        found["difference"] = apart(found["gradients"], truth.gradients("conventional"))
        return step()

    worker.engine.optimizer_step = optimizer_step
    output = worker.train_batch(data)
    metrics = tu.get(output, "metrics")
    found["loss"] = metrics["loss"]
    found["metrics"] = {name: value for name, value in metrics.items() if name.startswith("densemixer/")}
    routers = [value.flatten() for name, value in found["gradients"].items() if small_models.is_router(name)]
    found["norm"] = torch.cat(routers).norm().item()
    return found


def compared(results: dict[str, Any], name: str) -> dict[str, Any]:
    """What of it goes into the report: tensors as whether they are, bit for bit, those without DenseMixer."""
    result, without = results[name], results.get(f"{name.partition(',')[0]}, off", {})
    same = {}
    for key in ("loss", "inferred", "exported"):
        if key in result and key in without:
            same[key] = equal(result[key], without[key])
    report = {key: value for key, value in result.items() if key not in ("gradients", "inferred", "exported", "loss")}
    return {**report, "as without": same}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def main() -> None:
    initialize_global_process_group_ray()
    logging.disable(logging.INFO)
    in_float32()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = run(*case)
        except ValueError as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        if dist.get_rank() == 0:
            print(
                name,
                {key: results[name][key] for key in ("layers", "error", "difference") if key in results[name]},
                flush=True,
            )
            Path(sys.argv[2]).write_text(json.dumps({name: compared(results, name) for name in results}))


if __name__ == "__main__":
    main()
