"""Test support: writes down what an engine of verl does, and the oracle's gradients of the same batch.

Loaded in every process of verl through ``VERL_USE_EXTERNAL_MODULES``. Each engine that trains writes
``RECORDS/ROLE.pt`` at its first optimizer step (rank 0), and ``RECORDS/ROLE-ops-RANK.jsonl`` as it infers: how many
torch operations each call ran.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import oracle
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ESTIMATORS = ("conventional", "densemixer", "centered")


def records() -> Path:
    return Path(os.environ["RECORDS"])


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def role(engine: Any) -> str:
    if engine.engine_config.forward_only:
        return "reference"
    return "critic" if engine.model_config.model_type == "value_model" else "actor"


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def effective(module: Any, name: str) -> Tensor:
    """A parameter with what LoRA adds to it."""
    weight = getattr(module.get_base_layer() if hasattr(module, "base_layer") else module, name)
    wrapped = module
    while hasattr(wrapped, "base_layer"):
        if getattr(wrapped, "parameter_name", None) == name:
            weight = weight + wrapped.get_delta_weight("default")
        wrapped = wrapped.base_layer
    return weight


class OracleBlock:
    """The forward of a Qwen3-MoE block.

    What DenseMixer adds to the router's gradient can go to a copy of the router's weight, `apart`.
    """

    def __init__(self, block: Any, estimator: str, apart: Tensor | None = None) -> None:
        self.block, self.estimator, self.apart = block, estimator, apart

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        router = self.block.gate.get_base_layer() if hasattr(self.block.gate, "base_layer") else self.block.gate
        logits = x @ effective(self.block.gate, "weight").T
        gate_up, down = (effective(self.block.experts, name) for name in ("gate_up_proj", "down_proj"))
        experts = [
            oracle.gated_expert(*both.chunk(2), d, nn.functional.silu) for both, d in zip(gate_up, down, strict=True)
        ]
        formula = oracle.Formula(experts, lambda logits: logits.softmax(-1), router.norm_topk_prob)
        index = logits.topk(router.top_k).indices

        def output(logits: Tensor, estimator: str) -> Tensor:
            return oracle.densemixer(x, logits, index, formula, estimator).view_as(hidden_states)

        if self.apart is None:
            return output(logits, self.estimator)
        copied = x @ self.apart.T
        return output(logits, "conventional") + output(copied, self.estimator) - output(copied, "conventional")


def plain_copy(engine: Any) -> nn.Module:
    """The engine's model as it is now, in float64 and without FSDP."""
    import transformers

    auto = transformers.AutoModelForCausalLM
    if engine.model_config.model_type == "value_model":
        auto = transformers.AutoModelForTokenClassification
    config = copy.deepcopy(engine.module.config)
    model: Any = auto.from_config(config, attn_implementation=engine.module.config._attn_implementation)
    if engine._is_lora:
        import peft

        model = peft.get_peft_model(model, copy.deepcopy(engine.module.peft_config["default"]))
    model.load_state_dict({name: full(value) for name, value in engine.module.state_dict().items()})
    return model.double()


def oracle_gradients(engine: Any, batches: list[Any], loss_function: Any, estimator: str) -> dict[str, Tensor]:
    """Through verl's own inputs and loss, averaged over the ranks as FSDP does."""
    model = plain_copy(engine)
    for block in moe_blocks(model).values():
        block.forward = OracleBlock(block, estimator)
    backward(engine, model, batches, loss_function)
    return averaged({name: p for name, p in model.named_parameters() if p.requires_grad})


def added_gradients(engine: Any, batches: list[Any], loss_function: Any, estimator: str) -> dict[str, Tensor]:
    """The part of the routers' gradients that the estimator adds, by the name of the weight."""
    model = plain_copy(engine)
    copies = {}
    for name, block in moe_blocks(model).items():
        copies[f"{name}.gate.weight"] = block.gate.weight.detach().clone().requires_grad_()
        block.forward = OracleBlock(block, estimator, copies[f"{name}.gate.weight"])
    backward(engine, model, batches, loss_function)
    return averaged(copies)


def moe_blocks(model: nn.Module) -> dict[str, Any]:
    return {n: block for n, block in model.named_modules() if hasattr(block, "gate") and hasattr(block, "experts")}


def backward(engine: Any, model: nn.Module, batches: list[Any], loss_function: Any) -> None:
    live, engine.module = engine.module, model
    try:
        for batch in batches:
            with oracle.Float64():
                loss, _ = engine.forward_step(batch, loss_function=loss_function, forward_only=False)
                loss.backward()
    finally:
        engine.module = live


def averaged(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    for parameter in parameters.values():
        dist.all_reduce(parameter.grad)
    return {name: parameter.grad / dist.get_world_size() for name, parameter in parameters.items()}


def record_engine(module: Any) -> None:
    engine_class = module.FSDPEngine
    infer, step = engine_class.infer_batch, engine_class.optimizer_step
    collect, forward = engine_class.forward_backward_batch, module.FSDPEngineWithLMHead.forward_step

    def infer_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with CountOperations() as operations:
            result = infer(self, *args, **kwargs)
        with (records() / f"{role(self)}-ops-{self.rank}.jsonl").open("a") as file:
            print(json.dumps(operations.count), file=file)
        return result

    def forward_backward_batch(self: Any, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        self._recorded: list[Any] = []
        self._loss_function = loss_function
        return collect(self, data, loss_function, forward_only)

    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if not forward_only and hasattr(self, "_recorded"):
            self._recorded.append(micro_batch)
        return forward(self, micro_batch, loss_function=loss_function, forward_only=forward_only)

    def optimizer_step(self: Any) -> Any:
        if not (records() / f"{role(self)}.pt").exists():
            dist.barrier()
            batches = self.__dict__.pop("_recorded")
            found = {"gradients": {n: full(p.grad) for n, p in self.module.named_parameters() if p.grad is not None}}
            for estimator in ESTIMATORS:
                found[estimator] = oracle_gradients(self, batches, self._loss_function, estimator)
                if not self._is_lora:
                    found[f"{estimator} adds"] = added_gradients(self, batches, self._loss_function, estimator)
            if self.rank == 0:
                torch.save(found, records() / f"{role(self)}.pt")
            dist.barrier()
        return step(self)

    engine_class.infer_batch = infer_batch
    engine_class.forward_backward_batch = forward_backward_batch
    engine_class.optimizer_step = optimizer_step
    module.FSDPEngineWithLMHead.forward_step = forward_step


class NumberedIds:
    """Takes the place of ``uuid`` where verl names prompts: it sorts batches by these names."""

    def __init__(self) -> None:
        self.count = 0

    def uuid4(self) -> uuid.UUID:
        self.count += 1
        return uuid.UUID(int=self.count)


def number_prompts(module: Any) -> None:
    module.uuid = NumberedIds()


WHEN_IMPORTED = {
    "verl.workers.engine.fsdp.transformer_impl": record_engine,
    "verl.trainer.ppo.v1.trainer_base": number_prompts,
}


class Finder:
    """Asked once for each of these modules."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        change = WHEN_IMPORTED.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("WITHOUT_DENSEMIXER"):  # importing any of it fails
    sys.modules.update(dict.fromkeys(["densemixer_core", "densemixer_adapters.verl"]))
sys.meta_path.insert(0, Finder)
