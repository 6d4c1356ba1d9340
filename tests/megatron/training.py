"""Small models of Megatron Core, trained by its own pipeline schedules, DDP and optimizer."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import cpu
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS, VOCABULARY, SEQUENCES, LENGTH, STEPS = 8, 64, 4, 16, 6
DEAD = EXPERTS // 2
"""The last half of the experts never enter the top-k."""


def build(**options: Any) -> Any:
    """The model, where one rank holds all of its layers."""
    (model,) = build_stage(**options)
    return model


def build_stage(pattern: str | None = None, own_values: bool = False, **options: Any) -> list[Any]:
    """This rank's part of a GPTModel or, with a ``pattern``, of a hybrid model: its chunks.

    Weights follow from their names, with layers and experts counted over all ranks.

    Args:
        pattern: Of the layers: attention, ``*``, and experts, ``E``.
        own_values: Whether attention is replaced by what each token gives, which works under context parallelism too.
        options: For ``TransformerConfig``.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    settings = TransformerConfig(
        **{
            "num_layers": len(pattern) if pattern else 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 16,
            "ffn_hidden_size": 16,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "normalization": "RMSNorm",
            "use_cpu_initialization": True,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "context_parallel_size": parallel_state.get_context_parallel_world_size(),
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": virtual,
            "pipeline_dtype": torch.float32 if pipeline > 1 else None,
            # An interleaved pipeline of two stages exchanges otherwise more than one tensor at a time with one peer.
            "overlap_p2p_comm": virtual is not None,
            "batch_p2p_comm": virtual is None,
            "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **options,
        }
    )
    chunks = []
    for stage in [None] if virtual is None else range(virtual):
        inside = {
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
            "position_embedding_type": "none" if own_values else "rope",
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
        }
        chunks.append(_hybrid(settings, pattern, inside) if pattern else _gpt(settings, stage, own_values, inside))
    with torch.no_grad():
        for chunk in chunks:
            _fill(chunk)
    return chunks


def _gpt(settings: TransformerConfig, stage: int | None, own_values: bool, inside: dict[str, Any]) -> GPTModel:
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, vp_stage=stage)
    if own_values:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = OwnValues
    if settings.mtp_num_layers:
        inside["mtp_block_spec"] = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
    return GPTModel(settings, spec, vp_stage=stage, **inside)


def _hybrid(settings: TransformerConfig, pattern: str, inside: dict[str, Any]) -> Any:
    """Of the parts of a GPTModel's layers: Megatron's own are Transformer Engine's."""
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    try:
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel as Model

        stack, submodules, name = block.HybridStack, block.HybridStackSubmodules, "hybrid_layer_pattern"
    except ImportError:  # before 0.17
        from megatron.core.models.mamba.mamba_model import MambaModel as Model
        from megatron.core.ssm import mamba_block as block

        stack, submodules, name = block.MambaStack, block.MambaStackSubmodules, "hybrid_override_pattern"
    block.TENorm = WrappedTorchNorm  # the norm after the last layer
    parts = get_gpt_decoder_block_spec(settings, use_transformer_engine=False).layer_specs[0].submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm, self_attention=parts.self_attention, self_attn_bda=parts.self_attn_bda
    )
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
    )
    layers = submodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
        moe_layer=ModuleSpec(TransformerLayer, submodules=experts),
    )
    return Model(settings, ModuleSpec(stack, submodules=layers), **{name: pattern}, **inside)


class OwnValues(nn.Module):
    """In the place of attention: each token's own value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return value.flatten(2)


def _fill(chunk: Any) -> None:
    numbers = {name: str(layer.layer_number) for name, layer in chunk.decoder.layers.named_children()}
    for name, parameter in chunk.named_parameters():
        if "norm" not in name:
            name = re.sub(r"^decoder\.layers\.(\d+)", lambda match: f"decoder.layers.{numbers[match[1]]}", name)
            generator = torch.Generator().manual_seed(zlib.crc32(_of_all_experts(name, chunk).encode()))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for _, layer in _moe_layers([chunk]):
        layer.router.expert_bias[DEAD:] = -100.0


def _of_all_experts(name: str, chunk: Any) -> str:
    before, local, after = name.partition(".local_experts.")
    if not local:
        return name
    position, _, rest = after.partition(".")
    (_, layer), *_ = _moe_layers([chunk])
    return f"{before}{local}{layer.local_expert_indices[int(position)]}.{rest}"


def _moe_layers(chunks: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    """Each layer, and its number among all stages' layers; its name where it is for multi-token prediction."""
    found = [(name, layer) for chunk in chunks for name, layer in chunk.named_modules() if isinstance(layer, MoELayer)]
    return [(name if name.startswith("mtp.") else str(layer.layer_number), layer) for name, layer in found]


class Writer:
    """What Megatron writes its log to, called as TensorBoard's and W&B's writers.

    Attributes:
        rows: By name, what it got of ours in each iteration; Megatron's own depends on what ran before in this process.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        self.log({name: value}, iteration)

    def log(self, values: dict[str, Any], iteration: int) -> None:
        ours = {name: float(value) for name, value in values.items() if name.startswith("densemixer/")}
        while ours and len(self.rows) <= iteration:
            self.rows.append({})
        if ours:
            self.rows[iteration].update(ours)


def log(config: TransformerConfig, iteration: int, **arguments: Any) -> str:
    """What Megatron-LM does in each iteration and on every rank.

    Returns:
        What it adds to the line on the console by that, from 0.17 on.
    """
    arguments = {
        "loss_scale": 1 / SEQUENCES,
        "iteration": iteration,
        "force_initialize": True,
        "track_names": [],  # of the losses of the router: there are none here
        "num_layers": config.num_layers,
        "moe_layer_freq": config.moe_layer_freq,
        "mtp_num_layers": config.mtp_num_layers,
        **arguments,
    }
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        track_moe_metrics(**arguments)
        return ""
    return get_moe_metrics_tracker().report(**arguments)


def wrap(chunks: Sequence[nn.Module], **distributed: Any) -> tuple[list[Any], Any]:
    """Megatron's DDP around them, and its optimizer.

    Args:
        chunks: This rank's part of a model.
        distributed: For ``DistributedDataParallelConfig``.
    """
    config: Any = chunks[0].config
    settings = DistributedDataParallelConfig(**distributed)
    wrapped = [
        # Only the first chunk's gradients are wanted last: Megatron-LM has one bucket for each of the others.
        DistributedDataParallel(config, settings, chunk, disable_bucketing=position > 0)
        for position, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    shared = settings.use_distributed_optimizer
    options = OptimizerConfig(
        optimizer="adam", lr=3e-3, min_lr=3e-3, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=shared
    )
    with cpu.CudaIsCpu():
        optimizer = get_megatron_optimizer(options, wrapped)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # of the process; a layer alone leaves another shape in it
    return wrapped, optimizer


def train(model: Any, steps: int = STEPS, loss_scale: float | None = None, **distributed: Any) -> dict[str, Any]:
    """Each rank trains its layers on its part of a batch.

    Args:
        model: The model, or this rank's chunks of it.
        steps: How often weights are updated.
        loss_scale: What a gradient scaler multiplies the loss by.
        distributed: For Megatron's ``DistributedDataParallelConfig``.

    Returns:
        ``losses`` of all steps, on the ranks that hold the last layer; by layer, the ``gradients`` of the routers in
        the first step and their ``weights`` after the last, [experts, hidden] as lists; the ``digest`` of losses and
        trained weights; and of each step the ``metrics`` in Megatron's log.
    """
    chunks = [model] if isinstance(model, nn.Module) else model
    config = chunks[0].config
    wrapped, optimizer = wrap(chunks, **distributed)
    if loss_scale is not None:
        config.grad_scale_func = lambda loss: loss * loss_scale
    writer = Writer()
    losses: list[float] = []
    gradients: dict[str, Any] = {}
    for step in range(steps):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        found = forward_backward(wrapped)
        if not gradients:
            gradients = {name: layer.router.weight.main_grad.tolist() for name, layer in _moe_layers(chunks)}
        with cpu.CudaIsCpu():
            succeeded, _, _ = optimizer.step()
        assert succeeded
        with cpu.CudaIsCpu():
            log(config, step, writer=writer, per_layer_logging=True)
        if found:
            loss = torch.stack(found).mean()
            dist.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            losses.append(loss.item() / parallel_state.get_data_parallel_world_size())
    if distributed.get("overlap_param_gather"):
        for chunk in wrapped:
            chunk.start_param_sync(force_sync=True)
    state = b"".join(weight.detach().numpy().tobytes() for chunk in chunks for weight in chunk.parameters())
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": {name: layer.router.weight.tolist() for name, layer in _moe_layers(chunks)},
        "digest": hashlib.sha256(repr(losses).encode() + state).hexdigest(),
        "metrics": writer.rows,
    }


def forward_backward(wrapped: Sequence[Any]) -> list[Tensor]:
    """Of this rank's part of the batch, one sequence after the other.

    Returns:
        The losses, on the ranks that hold the last layer.
    """
    sequences = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    sequences = sequences.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    with cpu.CudaIsCpu():
        found: list[Tensor] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[_microbatches(sequences) for _ in wrapped],
            model=wrapped,
            num_microbatches=len(sequences),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
    return found


def _microbatches(sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """One sequence after the other: this rank's part of its tokens, their positions, and the tokens that follow."""
    parts = parallel_state.get_context_parallel_world_size()
    part = parallel_state.get_context_parallel_rank()
    for sequence in sequences:
        whole = sequence[:-1], torch.arange(LENGTH), sequence[1:]
        yield tuple(tensor.chunk(parts)[part].unsqueeze(0) for tensor in whole)


def _forward_step(batches: Iterator[tuple[Tensor, ...]], model: Any) -> tuple[Tensor, Any]:
    tokens, positions, following = next(batches)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def loss(output: Tensor) -> tuple[Tensor, ...]:
        mean = output.mean() / parallel_state.get_context_parallel_world_size()
        if model.config.calculate_per_token_loss:
            return output.sum(), torch.tensor(output.numel(), dtype=torch.int), mean.detach().clone()
        return mean, mean.detach().clone()

    return model(tokens, positions, mask, labels=following), loss
