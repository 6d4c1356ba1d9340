"""Test support: VeOmni's models, spread over the ranks that there are, and their gradients against the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import stand_ins
import torch.distributed as dist
from small_models import Gradients, apart, full, ids_of, loss_of, saved, truth, worst

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

STATES: dict[int, Any] = {}
"""VeOmni's, by the number of ranks that experts are spread over: each makes groups of processes."""


def use(ep: int) -> Any:
    from veomni.distributed import parallel_state

    if ep not in STATES:
        world = dist.get_world_size()
        STATES[ep] = parallel_state.init_parallel_state(
            dp_size=world,
            dp_shard_size=world,
            extra_parallel_sizes=(ep,),
            dp_mode="fsdp2",
            device_type="cpu",
            name=f"ep{ep}",
        )
    parallel_state.set_parallel_state(STATES[ep])
    return STATES[ep]


def build(ep: int, family: str) -> Any:
    """As it comes from `build_foundation_model`, without weights."""
    from veomni.models.auto import build_foundation_model

    use(ep)
    experts = stand_ins.FUSED if ep > 1 else "eager"  # VeOmni has no other experts that are spread
    folder, chosen = str(saved(family)), stand_ins.operations(experts)
    return build_foundation_model(folder, folder, "float32", ops_implementation=chosen, init_device="meta")


def parallelised(model: Any, family: str, mixed: bool = False, **options: Any) -> Any:
    from veomni.arguments import MixedPrecisionConfig
    from veomni.distributed.torch_parallelize import build_parallelize_model

    options = {"enable_gradient_checkpointing": False, "enable_reentrant": False, **options}
    return build_parallelize_model(
        model,
        weights_path=str(saved(family)),
        mixed_precision=MixedPrecisionConfig(enable=mixed),
        init_device="meta",
        broadcast_model_weights_from_rank0=True,
        basic_modules=list(model._no_split_modules),
        **options,
    ).train()


def gradients(model: Any, ep: int) -> Gradients:
    return full({name: parameter.grad for name, parameter in model.named_parameters()}, STATES[ep])


def verdict(found: Gradients, family: str, estimator: str) -> dict[str, float]:
    parts = dist.get_world_size()
    exact, conventional = (truth(family, kind, parts) for kind in (estimator, "conventional"))
    return {"error": worst(found, exact), "difference": apart(found, conventional)}


def plain(
    ep: int,
    family: str = "qwen3_moe",
    estimator: str = "densemixer",
    attach: Callable[[Any, DenseMixerConfig], Any] = apply_densemixer,
    afterwards: bool = False,
    **options: Any,
) -> dict[str, Any]:
    model = build(ep, family)
    config = DenseMixerConfig(estimator)
    if not afterwards:
        attach(model, config)
    model = parallelised(model, family, **options)
    if afterwards:
        attach(model, config)
    for _ in range(2):  # weights are gathered anew
        model.zero_grad()
        loss_of(model, ids_of(dist.get_rank())).backward()
    return verdict(gradients(model, ep), family, estimator)
