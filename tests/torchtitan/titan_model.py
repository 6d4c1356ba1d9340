"""A tiny model in torchtitan's own Trainer, and the same model in one process with the oracle for its experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import titan_layer
import torch
import torch.distributed as dist
import without_gpu
from tiny import VOCABULARY, model_spec
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig, DebugConfig, OverrideConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.trainer import Trainer

from densemixer_adapters.torchtitan import experts as weights_of

LENGTH, SEQUENCES = 16, 6
SWITCH = "densemixer_adapters.torchtitan.densemixer"
CHECKPOINTING = {"none": lambda: None, "full": FullAC.Config, "selective": SelectiveAC.Config}


class NoTokenizer(BaseTokenizer):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any, **kwargs: Any) -> None:
        self.eos_id = 0

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    decode = get_vocab_size = encode  # type: ignore[assignment]


class NoData(BaseDataLoader):
    """The tests give each step its batch."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, **kwargs: Any) -> None: ...

    def __iter__(self) -> Any:
        return iter([])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def float32_experts() -> None:
    """Let both sides compute experts in float32: bfloat16 would hide errors."""
    without_gpu.float32_experts()
    weights_of.COMPUTES_IN = torch.float32


def trainer(
    folder: str,
    imports: list[Any],
    *,
    expert: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    backend: str = "partial_dtensor",
    checkpointing: str = "none",
    spec: Any = None,
    **others: Any,
) -> Trainer:
    """torchtitan's own, for this process's place in the world; what isn't tensor or pipeline parallel is FSDP2."""
    return Trainer(
        Trainer.Config(
            model_spec=spec or model_spec(),
            tokenizer=NoTokenizer.Config(),
            loss=CrossEntropyLoss.Config(),
            dataloader=NoData.Config(),
            optimizer=OptimizersContainer.Config(
                param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})]
            ),
            checkpoint=CheckpointManager.Config(enable=False),
            parallelism=ParallelismConfig(
                data_parallel_shard_degree=dist.get_world_size() // (tensor * pipeline),
                tensor_parallel_degree=tensor,
                expert_parallel_degree=expert,
                pipeline_parallel_degree=pipeline,
                pipeline_parallel_schedule="1F1B",
                spmd_backend=backend,
            ),
            training=TrainingConfig(
                local_batch_size=2,
                seq_len=LENGTH,
                mixed_precision_param="float32",
                disable_cuda_graphs=True,
                steps=2,
            ),
            activation_checkpoint=CHECKPOINTING[checkpointing](),
            compile=others.get("compile", CompileConfig()),
            debug=others.get("debug", DebugConfig(seed=1, enable_structured_logging=False)),
            override=OverrideConfig(imports=imports),
            dump_folder=folder,
        )
    )


def plain(name: str) -> str:
    """A parameter's name in checkpoints."""
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def load(model: Any, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights[plain(name)]
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def tokens() -> tuple[Tensor, Tensor]:
    """Inputs and labels of the whole world, [sequences, length] each."""
    rows = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def share(run: Trainer, even: bool) -> slice:
    """This rank's sequences. Unless they must be ``even``, ranks have different numbers of them."""
    mesh = run.parallel_dims.get_mesh("batch") if run.parallel_dims.dp_enabled else None
    ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh else (1, 0)
    sizes = {1: [6], 2: [4, 2], 4: [1, 2, 2, 1]}[ranks]
    if even:
        sizes = [SEQUENCES // ranks] * ranks
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def step(run: Trainer, even: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this rank's tokens, a part of the whole, and the gradients of all parameters, whole."""
    (model,) = run.model_parts
    model.zero_grad()
    mine = share(run, even)
    inputs, labels = (tensor[mine] for tensor in tokens())
    loss = run.forward_backward_step(
        input_dict={"input": inputs, "positions": torch.arange(LENGTH).repeat(len(inputs), 1)},
        labels=labels,
        global_valid_tokens=torch.tensor(float(SEQUENCES * LENGTH)),
    )
    gradients = {plain(name): whole(parameter.grad) for name, parameter in model.named_parameters()}
    return whole(loss), gradients


def initial_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = model_spec().model.build()
    with torch.no_grad():
        model.init_states()
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.mul_(20)  # so that scores differ, and no selection hangs on rounding
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def truth(weights: dict[str, Tensor], estimator: str) -> dict[str, Tensor]:
    """All gradients of the whole batch in float64, with the oracle in the place of each layer's experts and router."""
    model = model_spec().model.build()
    with torch.no_grad():
        model.init_states()
        load(model, weights)
    model = model.double().train()
    for block in model.layers.values():
        block.moe.forward = _dense(block.moe, estimator)
    inputs, labels = tokens()
    positions = torch.arange(LENGTH).repeat(SEQUENCES, 1)
    with titan_layer.Float64():
        predicted = model(inputs, positions=positions, attention_masks=model.get_attention_masks(positions=positions))
        loss = F.cross_entropy(predicted.flatten(0, 1), labels.flatten(), reduction="sum") / labels.numel()
        loss.backward(gradient=None)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _dense(moe: Any, estimator: str) -> Any:
    def forward(x: Tensor) -> Tensor:
        flat, parameters = x.flatten(0, -2), dict(moe.named_parameters())
        index = (flat @ parameters["router.gate.weight"].T).topk(moe.router.top_k, -1).indices
        return titan_layer.dense(moe, parameters, flat, index, estimator).view_as(x)

    return forward
