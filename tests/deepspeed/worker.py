"""Runs on two ranks: gradients under ZeRO-3's front ends, compared with a dense float64 oracle on the whole batch.

Usage: torchrun --nproc-per-node 2 worker.py REPORT. Rank 0 writes the largest relative error of each case as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import oracle
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from densemixer_adapters.deepspeed import mark_leaf_modules
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
PERSIST_NOTHING = {"stage": 3, "stage3_param_persistence_threshold": 0}
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": PERSIST_NOTHING,
}


def make_qwen3() -> PreTrainedModel:
    return randomise(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=6)))


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return model.train()


def make_batch() -> Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))


def oracle_gradients(estimator: str = "densemixer") -> dict[str, Tensor]:
    """Of the Qwen3 model on the whole batch, in float64, in this process alone."""
    model = make_qwen3().double()
    for layer in model.model.layers:
        layer.mlp.forward = OracleBlock(layer.mlp, estimator)
    tokens = make_batch()
    with oracle.Float64():
        model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class OracleBlock:
    def __init__(self, block: Any, estimator: str) -> None:
        self.block, self.estimator = block, estimator

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = x @ self.block.gate.weight.T
        experts = self.block.experts
        formula = oracle.Formula(
            [
                oracle.gated_expert(*gate_up.chunk(2), down, nn.functional.silu)
                for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)
            ],
            score=lambda logits: logits.softmax(-1),
            renormalised=self.block.gate.norm_topk_prob,
        )
        index = logits.topk(SIZES["num_experts_per_tok"]).indices
        return oracle.densemixer(x, logits, index, formula, self.estimator).view_as(hidden_states)


def worst(gradients: dict[str, Tensor], truth: dict[str, Tensor], only: str = "") -> float:
    assert gradients.keys() == truth.keys(), gradients.keys() ^ truth.keys()
    return max(oracle.worst_error(gradients[name], truth[name]) for name in truth if only in name)


def my_share() -> Tensor:
    return make_batch().chunk(dist.get_world_size())[dist.get_rank()]


def calls_out_of_order(leaf: bool) -> int:
    """In how many steps ZeRO-3 gave up the order of modules that it had recorded. Then it can't prefetch.

    The batches' sizes differ, and with them the number of chunks in which DenseMixer runs the experts.
    """
    model = make_qwen3()
    handle = apply_densemixer(model, DenseMixerConfig(workspace_mb=1))
    mark_leaf_modules(handle)
    assert get_z3_leaf_modules(model) == [layer.block for layer in handle.layers]
    mark_leaf_modules(handle, leaf)
    assert len(get_z3_leaf_modules(model)) == (len(handle.layers) if leaf else 0)
    engine = start(model, {**PERSIST_NOTHING, "leaf_module": {"classes": []}})  # DeepSpeed knows this class itself
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    count = 0
    for length in (8, 600, 8):
        tokens = torch.randint(0, SIZES["vocab_size"], (2, length))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        count += coordinator.is_invalid_trace()
        engine.step()
    engine.destroy()
    return count


def start(model: PreTrainedModel, optimisation: dict[str, Any]) -> Any:
    config = {**CONFIG, "zero_optimization": optimisation, "optimizer": {"type": "SGD", "params": {"lr": 0.0}}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def with_accelerate(model: PreTrainedModel) -> dict[str, Tensor]:
    mark_leaf_modules(apply_densemixer(model))
    plugin = DeepSpeedPlugin(CONFIG)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    tokens = my_share()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
    engine.destroy()
    AcceleratorState._reset_state(True)
    return gradients


def with_trainer(model: PreTrainedModel) -> dict[str, Tensor]:
    """From one step of SGD at a learning rate of 1: a weight changes by its gradient."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mark_leaf_modules(apply_densemixer(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            deepspeed={**CONFIG, "gradient_clipping": 0.0},
            per_device_train_batch_size=2,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
        )
        # The Trainer divides by the number of labels, and a sequence's first one can't be predicted.
        rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in make_batch().tolist()]
        Trainer(model, arguments, train_dataset=rows).train()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: start[name] - parameter.detach() for name, parameter in model.named_parameters()}


def cases() -> Iterator[tuple[str, float]]:
    truth = oracle_gradients()
    yield "conventional", worst(oracle_gradients("conventional"), truth, only="gate.weight")
    yield "zero3 accelerate", worst(with_accelerate(make_qwen3()), truth)
    yield "zero3 trainer", worst(with_trainer(make_qwen3()), truth)
    yield "out of order with leaf modules", calls_out_of_order(leaf=True)
    yield "out of order without", calls_out_of_order(leaf=False)


def main(report: Path) -> None:
    deepspeed.init_distributed("gloo")
    results = {}
    for name, error in cases():
        results[name] = error
        if dist.get_rank() == 0:
            print(name, error, flush=True)
            report.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
