"""Router metrics in Megatron Core: what a model's ranks measure, taken together, and where its training loops log it.

Megatron-LM, and what is built like it, calls Megatron Core in each iteration and on every rank to log what is known of
its Mixture-of-Experts layers. There the metrics of the step join in, on their way to the console, TensorBoard and W&B.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from densemixer_adapters.megatron.layer import MegatronLayer, watched
from densemixer_adapters.metrics.gradients import Measured, RouterMeter, at_places
from densemixer_adapters.metrics.names import NORM
from densemixer_adapters.switch import wrap

_T = TypeVar("_T")
_wanted = False


def want_metrics() -> None:
    """Have training loops of this process log them. Called on every rank alike, whichever layers it holds."""
    global _wanted
    _wanted = True


class MegatronRanks:
    """How a model of Megatron Core and its tokens are spread over ranks.

    Args:
        layers: Of this rank.
        pipeline: The stages of the pipeline; Megatron's global group by default.
    """

    def __init__(self, layers: Sequence[MegatronLayer], pipeline: dist.ProcessGroup | None = None) -> None:
        from megatron.core import parallel_state

        self._layers = layers
        self._pipeline = pipeline or parallel_state.get_pipeline_model_parallel_group()
        group = getattr(layers[0].router, "tp_dp_cp_group", None) if layers else None
        # Before 0.16 routers don't know those that hold the same router.
        self._replicas = group or parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)

    def sum(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self._replicas)

    def divisor(self, position: int) -> float:
        """Megatron sums over tokens that are split by sequence parallelism, and takes means over data and context
        parallel ranks, but with a loss per token: that it sums there too, and scales later, as `LayerMeter` does."""
        layer = self._layers[position]
        config, tensor = layer.block.config, layer.block.config.tensor_model_parallel_size
        same = 1 if getattr(layer.router.weight, "sequence_parallel", False) else tensor
        others = 1 if config.calculate_per_token_loss else dist.get_world_size(self._replicas) // tensor
        return same * others * (1.0 if layer.loss_scale is None else float(layer.loss_scale))

    def all_layers(self, ours: list[_T]) -> list[_T]:
        stages: list[list[_T]] = [ours] * dist.get_world_size(self._pipeline)
        if len(stages) > 1:
            dist.all_gather_object(stages, ours, group=self._pipeline)
        return [each for stage in stages for each in stage]


def measure(layers: Sequence[MegatronLayer], pipeline: dist.ProcessGroup | None = None) -> dict[str, float]:
    """What the layers' meters measured since this was last called, as logs have it: see `metrics.at_places`.

    Collective: all ranks of a model call it, also those that hold none of its layers; all get the same.

    Args:
        layers: Of this rank. Those that didn't train since then don't count.
        pipeline: The stages of the pipeline; Megatron's global group by default.
    """
    layers = [layer for layer in layers if layer.ran]
    ranks = MegatronRanks(layers, pipeline)
    meter = RouterMeter(layers, meters=[layer.meter for layer in layers if layer.meter is not None], ranks=ranks)
    for layer in layers:
        layer.ran = False
    places = ranks.all_layers(_places(layers))
    frozen = ranks.all_layers([layer.router_is_frozen for layer in layers])
    values = meter.gradients()
    if frozen and all(frozen):
        values = {NORM: Measured([0.0] * len(frozen), 0.0)}
    return at_places(places, values | meter.load() | meter.pairs_left_out())


def patch_moe_utils(module: Any) -> None:
    """Up to Megatron Core 0.16: log where its function ``track_moe_metrics`` does."""
    try:
        from megatron.core.transformer.moe import moe_logging  # noqa: F401
    except ImportError:
        signature = inspect.signature(module.track_moe_metrics)
    else:  # whose class is patched
        return

    @wrap(module, "track_moe_metrics")
    def track_moe_metrics(original: Any, *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        sums = given.get("total_loss_dict")
        for name, value in _log(given).items():
            if sums is not None:  # of all iterations since the last line on the console
                sums[name] = sums.get(name, torch.zeros(1)) + value


def patch_moe_logging(module: Any) -> None:
    """From Megatron Core 0.17 on: log where its ``MoEMetricsTracker.report`` does."""
    signature = inspect.signature(module.MoEMetricsTracker.report)

    @wrap(module.MoEMetricsTracker, "report")
    def report(original: Any, *args: Any, **kwargs: Any) -> str:
        line: str = original(*args, **kwargs)
        return line + "".join(
            f" {name}: {value:.3E} |" for name, value in _log(signature.bind(*args, **kwargs).arguments).items()
        )


def patch_data_parallel(module: Any) -> None:
    """Have meters do what Megatron does with its gradients."""

    @wrap(module.DistributedDataParallel, "zero_grad_buffer")
    def zero_grad_buffer(original: Any, self: Any) -> None:
        original(self)
        for layer in _watched_in(self):
            layer.meter.discard_gradients()

    @wrap(module.DistributedDataParallel, "scale_gradients")
    def scale_gradients(original: Any, self: Any, scaling_factor: Any) -> None:
        original(self, scaling_factor)
        for layer in _watched_in(self):
            layer.meter.scale_gradients(scaling_factor)


def _watched_in(model: Any) -> list[Any]:
    layers = list(watched.values())
    if not layers:
        return layers
    modules = set(model.modules())
    return [layer for layer in layers if layer.block in modules and layer.meter is not None]


def _log(given: dict[str, Any]) -> dict[str, float]:
    """Write the metrics where the arguments of Megatron's own function say. Collective.

    Returns:
        Those over all layers that are numbers.
    """
    if not _wanted:
        return {}
    pipeline = getattr(given.get("pg_collection"), "pp", None)
    metrics = measure(list(watched.values()), pipeline)
    whole = {name: value for name, value in metrics.items() if name.count("/") == 1}
    written = metrics if given.get("per_layer_logging") else whole
    writer, wandb_writer, iteration = (given.get(name) for name in ("writer", "wandb_writer", "iteration"))
    if writer is not None:
        for name, value in written.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer is not None and written:
        wandb_writer.log(written, iteration)
    return {name: value for name, value in whole.items() if math.isfinite(value)}


def _places(layers: Sequence[MegatronLayer]) -> list[str]:
    """The layers' numbers in the whole model, from 0 as in Megatron's own log. Those for multi-token prediction count
    by themselves; before 0.17 they have numbers beyond the model's layers, or those of other layers. Whose layer it is
    says the configuration, which a model's layers share: those of another model have the same numbers too."""
    places: list[str] = []
    own: set[tuple[int, int]] = set()
    predictions: dict[int, int] = {}
    for layer in layers:
        number, config = layer.block.layer_number or 0, layer.block.config
        if layer.is_for_prediction or number > config.num_layers or (id(config), number) in own:
            position = predictions.setdefault(id(config), 0)
            predictions[id(config)] += 1
            places.append(f"mtp_layer_{position}")
        else:
            own.add((id(config), number))
            places.append(f"layer_{number - 1}")
    return places
