"""Training by Megatron Core's own pipeline schedules, DDP and optimizer, and what it writes to its log."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import cpu
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from small_models import LENGTH, VOCABULARY, moe_layers
from torch import Tensor, nn

SEQUENCES, STEPS = 4, 6


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
            gradients = {name: layer.router.weight.main_grad.tolist() for name, layer in moe_layers(chunks)}
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
        "weights": {name: layer.router.weight.tolist() for name, layer in moe_layers(chunks)},
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
