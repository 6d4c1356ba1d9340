"""What is kept from forward to backward."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, IMPLEMENTATIONS
from runs import loss_of
from torch import Tensor, nn

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig


def saved_bytes(model: nn.Module) -> int:
    """Bytes of all storages that autograd saves in one forward, each counted once; parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    del loss
    return sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [DenseMixerConfig(), DenseMixerConfig("centered"), DenseMixerConfig(budget=0.125)], ids=str
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_tokens_times_experts_more_than_conventional(
    family: str, implementation: str, config: DenseMixerConfig, dtype: torch.dtype
) -> None:
    model = FAMILIES[family].build(implementation).to(dtype)
    conventional = saved_bytes(model)
    with apply_densemixer(model, config) as handle:
        extra = saved_bytes(model) - conventional
    tokens, experts, layers = 24, 8, len(handle.layers)
    # Per token: the scores that softmax or sigmoid keep and the factor c, in float32.
    allowed = layers * tokens * (experts + 1) * 4
    if config.budget < 1 or (config.estimator == "centered" and FAMILIES[family].renormalised):
        allowed += layers * tokens * (model.config.hidden_size * dtype.itemsize + 4)
    assert 0 <= extra <= allowed
