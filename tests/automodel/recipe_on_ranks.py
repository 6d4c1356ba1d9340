"""Automodel's own fine-tuning recipe on one, two and four ranks, beside a float64 model with the oracle's layers.

Usage: recipe_on_ranks.py FOLDER. Writes FOLDER/report.json: for each cell the worst error of all gradients of the first
step, with DenseMixer and without, and what else differs between the two.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_tiny
import on_cpu  # noqa: F401 - what asks for CUDA gets the CPU
import oracle
import torch
import torch.distributed as dist
import transformers
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from ranks import join, of_all_ranks
from safetensors import safe_open
from torch import Tensor, multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

REMOVED = object()
OWN: dict[str, Any] = {}
HF = {"model.force_hf": True, "model.backend": REMOVED}
CELLS: dict[str, tuple[int, dict[str, Any]]] = {
    # ranks, and what differs from examples/automodel/tiny.yaml
    "own layers": (1, OWN),
    "own layers, FSDP 2": (2, OWN),
    "own layers, FSDP 2, checkpointing": (2, {"distributed.activation_checkpointing": True}),
    "own layers, EP 2": (2, {"distributed.ep_size": 2}),
    "own layers, EP 2, checkpointing": (
        2,
        {"distributed.ep_size": 2, "distributed.activation_checkpointing": True, "model.backend.experts": "torch_mm"},
    ),
    "own layers, EP 2, checkpointing selective": (
        2,
        {"distributed.ep_size": 2, "distributed.activation_checkpointing": "selective"},
    ),
    "transformers' layers": (1, HF),
    "transformers' layers, FSDP 2": (2, HF),
    "own layers, FSDP 2 with EP 2": (4, {"distributed.ep_size": 2}),
}


class OracleBlock:
    """The forward of transformers' Qwen3-MoE block, dense, on the selection of a float32 router."""

    def __init__(self, block: Any, estimator: str) -> None:
        self.block, self.estimator = block, estimator

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        logits = x @ self.block.gate.weight.T
        both, down = self.block.experts.gate_up_proj, self.block.experts.down_proj
        experts = [
            oracle.gated_expert(*pair.chunk(2), d, nn.functional.silu) for pair, d in zip(both, down, strict=True)
        ]
        formula = oracle.Formula(experts, lambda logits: logits.softmax(-1), True)
        index = logits.topk(self.block.gate.top_k).indices
        return oracle.densemixer(x, logits, index, formula, self.estimator).view_as(hidden_states)


def truth(folder: Path, batches: list[dict[str, Tensor]], estimator: str) -> dict[str, Tensor]:
    """The gradients of the mean loss over all labels of these batches, by transformers' names."""
    model: Any = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    for block in model.modules():
        if type(block).__name__ == "Qwen3MoeSparseMoeBlock":
            block.forward = OracleBlock(block, estimator)
    losses, labels = [], 0
    with oracle.Float64():
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            target = batch["labels"].flatten()
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum"))
            labels += int((target != -100).sum())
        (torch.stack(losses).sum() / labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def as_transformers(name: str, gradient: Tensor) -> tuple[str, Tensor]:
    """A gradient of Automodel's own model under the name and in the shape of transformers'."""
    name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    for own, theirs in (("gate_and_up_projs", "gate_up_proj"), ("down_projs", "down_proj")):
        if name.endswith(own):
            return name.replace(own, theirs), gradient.transpose(-1, -2)
    return name, gradient


def train(folder: Path, changes: dict[str, Any], densemixer: Any, out: Path) -> dict[str, Any]:
    """One step of the recipe: its gradients before they are applied, its batches, its loss, what it saved."""
    config = load_yaml_config(Path(make_tiny.__file__).with_name("tiny.yaml"))
    settings = {
        "model.pretrained_model_name_or_path": str(folder),
        "model.densemixer": densemixer,
        "step_scheduler.max_steps": 1,
        "clip_grad_norm.max_norm": 1e9,
        "checkpoint.enabled": True,
        "checkpoint.checkpoint_dir": str(out),
        "checkpoint.model_save_format": "safetensors",
        "checkpoint.save_consolidated": True,
        **changes,
    }
    for key, value in settings.items():
        config.set_by_dotted(key, value)
    for key, value in list(vars(config.model).items()):
        if value is REMOVED:
            delattr(config.model, key)
    recipe: Any = TrainFinetuneRecipeForNextTokenPrediction(config)
    recipe.setup()
    (optimizer,), (model,) = recipe.optimizer, recipe.model_parts
    found: dict[str, Any] = {"gradients": {}, "batches": [], "losses": []}
    host_step, host_batch, host_log = optimizer.step, recipe._forward_backward_step, recipe.log_train_metrics

    def step(*args: Any, **kwargs: Any) -> Any:
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found["gradients"].update([as_transformers(name, full.detach().clone())])
        return host_step(*args, **kwargs)

    def batch(position: int, batch: dict[str, Any], **kwargs: Any) -> Any:
        found["batches"].append({key: value.clone() for key, value in batch.items() if isinstance(value, Tensor)})
        return host_batch(position, batch, **kwargs)

    def log(data: Any) -> None:
        found["losses"].append(float(data.metrics["loss"]))
        host_log(data)

    optimizer.step, recipe._forward_backward_step, recipe.log_train_metrics = step, batch, log
    recipe.run_train_validation_loop()
    found["checkpointed"] = any(isinstance(module, CheckpointWrapper) for module in model.modules())
    return found


def saved(out: Path) -> dict[str, Any]:
    """What a run has saved: names of files and tensors, and the model's configuration."""
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    tensors = {}
    for path in sorted(out.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors[str(path.relative_to(out))] = sorted(file.keys())
    configs = [json.loads(path.read_text()) for path in sorted(out.rglob("config.json"))]
    return {"files": [file for file in files if not file.endswith(".jsonl")], "tensors": tensors, "configs": configs}


def measure(folder: Path, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    runs = {}
    for name, option, estimator in (
        ("without", REMOVED, "conventional"),
        ("with", {"estimator": "centered"}, "centered"),
    ):
        found = train(folder, changes, option, out / name)
        batches = [batch for rank in of_all_ranks(found["batches"]) for batch in rank]
        expected = truth(folder, batches, estimator)
        assert found["gradients"].keys() == expected.keys(), found["gradients"].keys() ^ expected.keys()
        found["error"] = max(oracle.worst_error(found["gradients"][key], value) for key, value in expected.items())
        runs[name] = found
    plain, ours = runs["without"], runs["with"]
    routers = [name for name in plain["gradients"] if name.endswith("gate.weight")]
    dist.barrier()
    before, after = saved(out / "without"), saved(out / "with")
    return {
        "checkpointed": ours["checkpointed"],
        "error": ours["error"],
        "error without": plain["error"],
        "difference": min(oracle.relative_error(plain["gradients"][n], ours["gradients"][n]) for n in routers),
        "losses": [plain["losses"], ours["losses"]],
        "tokens": [sum(batch["input_ids"].numel() for batch in rank) for rank in of_all_ranks(ours["batches"])],
        "saved alike": before == after,
        "saved": {"files": len(after["files"]), "tensors": sum(map(len, after["tensors"].values()))},
        "ours in a configuration": "densemixer" in json.dumps(after["configs"]).lower(),
    }


def start(rank: int, processes: int, store: str, folder: Path, only: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    join(rank, processes, store, seconds=300)
    for name, (ranks, changes) in CELLS.items():
        if ranks != processes or only not in name:
            continue
        out = folder / name.replace(" ", "-")
        found = measure(folder / "tiny", out, changes)
        if rank == 0:
            out.with_suffix(".json").write_text(json.dumps({name: found}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive what they belong to


def main(folder: Path, only: str = "") -> None:
    make_tiny.save(str(folder / "tiny"))
    for processes in (1, 2, 4):
        if any(only in name for name, (ranks, _) in CELLS.items() if ranks == processes):
            arguments = (processes, tempfile.mktemp(), folder, only)
            # Forked: importing Automodel takes longer than most that is done with it here.
            multiprocessing.start_processes(start, arguments, nprocs=processes, start_method="fork")
    found: dict[str, Any] = {}
    for path in folder.glob("*.json"):
        found |= json.loads(path.read_text())
    (folder / "report.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
