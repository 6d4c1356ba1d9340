"""How far training has moved the routers, on one fixed batch: the first that the model was trained on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from densemixer_adapters.metrics.gradients import Measured, sum_over_ranks
from densemixer_adapters.metrics.names import CHANGE, DRIFT
from densemixer_adapters.transformers.calls import recording
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_core.routing import are_probabilities

TOKENS = 4096
"""Of the batch, on each rank, that are compared; the reference is kept in memory."""

_FOR_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
"""What a model is called with for the sake of a loss, the last by TRL's trainers. Without it none is computed."""

Context = Callable[[], contextlib.AbstractContextManager[object]]


class RoutingDrift:
    """Runs the model on its first training batch again, in evaluation mode, and compares the routing.

    The batch is taken from the model's own forward, and run for the first time just before that. Nothing is drawn from
    data loaders or random generators, so training stays what it is, bit for bit.

    Args:
        layers: The layers to compare.
        model: What is called with the batch, wrapped by FSDP if that is used. All ranks call it alike.
        within: A context for that, in which the routers choose by themselves.
    """

    def __init__(
        self, layers: Sequence[DenseMixerLayer], model: nn.Module, within: Context = contextlib.nullcontext
    ) -> None:
        self.layers = layers
        self.model = model
        self._within = within
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._mask: Tensor | None = None  # of tokens that are no padding
        self._autocast: dict[str, Any] = {}
        self._start: list[Routing | None] = []
        # Before the hooks of FSDP2 and ZeRO-3, which would find the model in the middle of a forward.
        self._hook = model.register_forward_pre_hook(self._capture, prepend=True, with_kwargs=True)

    def remove(self) -> None:
        """Stop waiting for a batch, and free what is kept."""
        self._hook.remove()
        self._batch, self._start = None, []

    def measure(self) -> dict[str, Measured]:
        """The routing against that of the start, by layer and over all of them; nothing before the first batch.

        Collective: all ranks call it. ``routing_change`` is the share of the selected experts that are selected no
        longer; ``logit_drift`` is the root mean square of the change of the logits over that of the logits at the
        start. For a softmax the mean over a token's logits is taken away first, since it has no effect.
        """
        if self._batch is None:
            return {}
        rows = []
        for start, now in zip(self._start, self._run(), strict=True):
            rows.append([0.0] * 4 if start is None or now is None else start.compare(now))
        rows = sum_over_ranks(rows)
        whole = [sum(column) for column in zip(*rows, strict=True)]
        return {
            CHANGE: Measured([_share(row[0], row[1]) for row in rows], _share(whole[0], whole[1])),
            DRIFT: Measured([_share(*row[2:]) ** 0.5 for row in rows], _share(*whole[2:]) ** 0.5),
        }

    def _capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (torch.is_grad_enabled() and model.training):  # not an evaluation before training
            return
        self._hook.remove()
        kwargs = without_loss(model, kwargs)
        self._batch = _copy(args), _copy(kwargs)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:  # padding doesn't count
            self._mask = mask.flatten().bool()
        # That of the batch: parameters can wait elsewhere.
        device = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), "cpu")
        self._autocast = dict(
            device_type=device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            # Else copies of weights that are made here, without a graph, would serve the training forward around it.
            cache_enabled=False,
        )
        self._start = self._run()

    def _run(self) -> list[Routing | None]:
        assert self._batch is not None
        args, kwargs = self._batch
        with evaluating(self.model), torch.autocast(**self._autocast), self._within():
            found = routing_of(self.layers, lambda: self.model(*args, **kwargs), self._mask)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # its root is not, after a forward
        return found


def without_loss(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with, for its outputs alone: neither a loss nor a cache is made."""
    found = {name: value for name, value in arguments.items() if name not in _FOR_THE_LOSS}
    config = getattr(model, "config", None)
    if hasattr(getattr(config, "get_text_config", lambda: config)(), "use_cache"):
        found["use_cache"] = False
    return found


def routing_of(
    layers: Sequence[DenseMixerLayer], forward: Callable[[], object], mask: Tensor | None = None
) -> list[Routing | None]:
    """How each layer routes in a forward of its model without gradients; None where it isn't called.

    Args:
        layers: The layers. DenseMixer must be attached to them.
        forward: Calls the model.
        mask: Which of the tokens are no padding, [tokens]; None for all. The first `TOKENS` of them count.
    """
    found: dict[DenseMixerLayer, Routing] = {}

    def keep(layer: DenseMixerLayer, router_output: Tensor, index: Tensor) -> None:
        rows = rows_of(mask, len(index))
        found[layer] = Routing(logits_of(router_output[rows][:TOKENS], layer.score), index[rows][:TOKENS])

    with torch.no_grad(), recording(keep):
        forward()
    return [found.get(layer) for layer in layers]


def rows_of(mask: Tensor | None, tokens: int) -> Tensor | slice:
    """Which rows are no padding, of what a layer that has seen so many tokens has for each of them."""
    # A layer may see other tokens than the mask speaks of, as experts of a vision tower do.
    return slice(None) if mask is None or len(mask) != tokens else mask.nonzero().flatten()


class Routing:
    """Logits, [tokens, experts], and selected experts, [tokens, k], of a layer."""

    def __init__(self, logits: Tensor, index: Tensor) -> None:
        self.logits, self.index = logits, index

    def compare(self, now: Routing) -> list[float]:
        """The number of selections that are gone, and of all; the squares of the logits' change, and of the logits."""
        kept = (self.index.unsqueeze(2) == now.index.unsqueeze(1)).any(-1).sum()
        moved = (now.logits - self.logits).double().square().sum()
        size = self.logits.double().square().sum()
        found: list[float] = torch.stack([self.index.numel() - kept.double(), moved, size]).tolist()
        return [found[0], float(self.index.numel()), *found[1:]]


def logits_of(router_output: Tensor, score: str) -> Tensor:
    """Logits in float32 at least, of a softmax those whose mean is zero, [tokens, experts]."""
    logits = router_output.to(torch.promote_types(router_output.dtype, torch.float32))
    if score != "softmax":
        return logits
    if are_probabilities(router_output):
        logits = logits.clamp(min=torch.finfo(logits.dtype).tiny).log()
    return logits - logits.mean(-1, keepdim=True)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and each of its modules as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _copy(value: Any) -> Any:
    """A copy of what a model is called with: frameworks reuse the memory of batches."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value
