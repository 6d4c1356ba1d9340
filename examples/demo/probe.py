"""What is measured on a model besides its training: on fixed held-out rows, outside the timed steps."""

from __future__ import annotations

from typing import Any

import torch
from batches import Batch
from results import Measurement
from torch import Tensor

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig


class Probe:
    """Measures a model, to which DenseMixer must not be attached, against what it was when this was built."""

    def __init__(self, model: Any, held_out: list[Batch], config: DenseMixerConfig) -> None:
        self._model = model
        self._held_out = held_out
        self._config = config
        self._start = selected_experts(model, held_out[0])

    def measure(self, step: int) -> Measurement:
        with apply_densemixer(self._model, self._config) as handle:
            routers: list[Tensor] = [weight for layer in handle.layers for weight in layer.router.parameters()]
            densemixer = self._gradient(routers)
        conventional = self._gradient(routers)
        added = (densemixer - conventional).norm()
        return Measurement(
            step=step,
            held_out_loss=self._loss(),
            gradient_conventional=conventional.norm().item(),
            gradient_densemixer=densemixer.norm().item(),
            share_unselected=(added / (added + conventional.norm())).item(),
            routing_change=routing_change(self._start, selected_experts(self._model, self._held_out[0])),
        )

    def _loss(self) -> float:
        self._model.eval()
        total = 0.0
        with torch.no_grad():
            for batch in self._held_out:
                total += self._model(**batch._asdict(), use_cache=False).loss.item() * batch.answers
        return total / sum(batch.answers for batch in self._held_out)

    def _gradient(self, weights: list[Tensor]) -> Tensor:
        self._model.eval()
        loss = self._model(**self._held_out[0]._asdict(), use_cache=False).loss
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])


def selected_experts(model: Any, batch: Batch) -> list[Tensor]:
    """Which experts each token goes to: per layer, bool [tokens without padding, experts].

    DenseMixer must not be attached to the model.
    """
    kept = batch.attention_mask.flatten().bool()
    selected: list[Tensor] = []

    def record(experts: Any, args: tuple[Any, ...]) -> None:
        index = args[1]
        chosen = torch.zeros(len(index), experts.num_experts, dtype=torch.bool, device=index.device)
        selected.append(chosen.scatter_(1, index, True)[kept])

    with apply_densemixer(model) as handle:
        hooks = [layer.experts.register_forward_pre_hook(record) for layer in handle.layers]
        model.eval()
        with torch.no_grad():
            model(**batch._asdict(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return selected


def routing_change(before: list[Tensor], now: list[Tensor]) -> float:
    """The share of the selections in ``before`` that aren't made ``now``; both from `selected_experts`."""
    lost = sum(int((old & ~new).sum()) for old, new in zip(before, now, strict=True))
    return lost / sum(int(layer.sum()) for layer in before)
