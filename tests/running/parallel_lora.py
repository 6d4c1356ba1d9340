"""LoRA by PEFT under transformers' own parallelism: the gradients where PEFT works, and elsewhere its own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
import torch.distributed as dist
from lora import truth_of
from parallel_gradients import UNREPORTED, Layout, load, share
from peft import LoraConfig, get_peft_model
from ranks import of_all_ranks
from runs import loss_of, selections
from setting import FAMILY, TOLERANCE, Gradients, Result, batch, build, gradients_of, worst
from torch.distributed.tensor import DTensor

from densemixer_adapters.transformers import apply_densemixer

ROUTER, EXPERTS = "mlp.gate.weight", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Wrap = Callable[[Any], Any]


def adapters(
    modules: Sequence[str] = (), parameters: Sequence[str] = (ROUTER,), saved: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Puts adapters that aren't zero on modules and parameters; ``saved`` train in full."""

    def wrap(model: Any) -> Any:
        torch.manual_seed(0)  # each rank makes its own
        options = LoraConfig(
            r=4,
            lora_alpha=6,
            init_lora_weights=False,
            target_modules=list(modules) or None,
            target_parameters=list(parameters) or None,
            modules_to_save=list(saved) or None,
        )
        return get_peft_model(model, options).train()

    return wrap


def lora(layout: Layout, wrap: Wrap) -> Result:
    """All that trains. PEFT's parameters are plain tensors, whose gradients nobody averages over ranks."""
    model = wrap(load(layout))
    apply_densemixer(model)
    loss_of(model, share(layout)).backward()
    found, values = whole(gradients_of(model)), whole(trained(model))
    if dist.get_rank():
        return UNREPORTED
    alone = wrap(build())
    with torch.no_grad():
        for name, parameter in trained(alone).items():
            parameter.copy_(values[name])
    truth, conventional = (dense(alone, estimator) for estimator in ("densemixer", "conventional"))
    routers = [name for name in truth if ".mlp.gate." in name]
    return Result(
        worst(oracle.worst_error, found, truth),
        TOLERANCE,
        worst(oracle.relative_error, found, conventional, routers),
    )


def trained(model: Any) -> Gradients:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensors: Gradients) -> Gradients:
    """Those in parts put together, and the mean over ranks of the others. Collective."""
    result = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            result[name] = value.detach().full_tensor()
        else:
            result[name] = value.detach().clone()
            dist.all_reduce(result[name])
            result[name] /= dist.get_world_size()
    return result


def dense(model: Any, estimator: str) -> Gradients:
    with selections(FAMILY, model) as indices, torch.no_grad():
        loss_of(model, batch())
    with oracle.Float64():
        truth = truth_of(FAMILY, model, indices, estimator)
        loss_of(truth, batch()).backward()
    return gradients_of(truth)


def their_error(layout: Layout, wrap: Wrap) -> str:
    """What PEFT says without DenseMixer; with it, attached before or after, it says the same."""
    said = [error_of(layout, wrap, attach) for attach in ("not", "before", "after")]
    assert said == said[:1] * 3, said
    return said[0]


def error_of(layout: Layout, wrap: Wrap, attach: str) -> str:
    model, error = load(layout), ""
    try:
        if attach == "before":
            apply_densemixer(model)
        model = wrap(model)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    if not any(errors := of_all_ranks(error)):  # else a rank alone would wait for the others
        try:
            if attach == "after":
                apply_densemixer(model)
            loss_of(model, share(layout))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        errors = of_all_ranks(error)
    assert any(errors), "nothing was said"
    return next(filter(None, errors))
