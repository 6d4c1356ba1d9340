"""What all ways of running share: a small model, a batch, the dense oracle's gradients of it, and how to compare."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import families
import oracle
import torch
import torch.distributed as dist
from families import Family, tokens
from runs import loss_of, selections
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from densemixer_adapters.transformers import UnsupportedModelError

FAMILY = families.FAMILIES["qwen3_moe"]
SHALLOW = "qwen3_moe of one layer"
"""For what takes as long as there are layers: torch traces each of them by itself."""
_ONE_LAYER = {**FAMILY.options, "num_hidden_layers": 1}
FAMILIES = {**families.FAMILIES, SHALLOW: dataclasses.replace(FAMILY, options=_ONE_LAYER)}
TOLERANCE = 1e-5
STEP = 1024.0  # of SGD: large, so that the weight before it hardly rounds the gradient away

Gradients = dict[str, Tensor]
Cells = dict[str, Callable[[], "Result | str"]]


@dataclasses.dataclass
class Result:
    """Of one cell of the matrix.

    Attributes:
        error: The largest error of any parameter's gradient against the oracle in float64.
        allowed: What the error must not exceed.
        difference: The largest difference of a router's gradient from conventional training: DenseMixer was on.
        more: What else a cell has to show.
    """

    error: float
    allowed: float
    difference: float
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


def build(family: Family = FAMILY) -> Any:
    return family.build()


def batch() -> Tensor:
    """Four sequences."""
    return tokens(batch=4)


def gradients_of(model: nn.Module) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def saved(family: str) -> str:
    """The folder of a saved model, the same on all ranks: for what transformers does as it loads one. Collective."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        build(FAMILIES[family]).save_pretrained(folder[0])
    dist.barrier()
    return folder[0]


def full(gradients: Gradients) -> Gradients:
    """Whole, where they are in parts on the ranks. Collective."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in gradients.items()}


def refusal(attach: Callable[[], Any]) -> str:
    """The message with which DenseMixer was refused."""
    try:
        attach()
    except UnsupportedModelError as error:
        return str(error)
    raise AssertionError("DenseMixer was attached")


def selected(model: nn.Module, family: Family = FAMILY) -> list[Tensor]:
    """The experts that the model selects for the batch, one tensor a layer."""
    with selections(family, model) as indices, torch.no_grad():
        loss_of(model, batch())
    return indices


def dense(
    model: nn.Module, indices: list[Tensor], estimator: str, family: Family = FAMILY, ids: Tensor | None = None
) -> Gradients:
    """The oracle's gradients in float64, in this process alone; of the batch, or of ``ids``."""
    with oracle.Float64():
        truth = family.oracle(model, indices, estimator)
        loss_of(truth, batch() if ids is None else ids).backward()
    return gradients_of(truth)


@functools.cache
def truth(estimator: str, family: str = "qwen3_moe") -> Gradients:
    model = FAMILIES[family].build()
    return dense(model, selected(model, FAMILIES[family]), estimator, FAMILIES[family])


def compare(gradients: Gradients, family: str = "qwen3_moe", **more: Any) -> Result:
    """Gradients of the batch in float32."""
    return judge(gradients, truth("densemixer", family), truth("conventional", family), **more)


def judge(gradients: Gradients, truth: Gradients, conventional: Gradients, **more: Any) -> Result:
    return Result(
        worst(oracle.worst_error, gradients, truth),
        TOLERANCE,
        worst(oracle.relative_error, gradients, conventional, routers(conventional)),
        more,
    )


def judge_half(gradients: Gradients, reference: Gradients, indices: list[Tensor], dtype: torch.dtype) -> Result:
    """Gradients in half precision may be as wrong as those of a dense implementation in the same dtype.

    Args:
        gradients: Of the way of running.
        reference: Of the oracle in the same dtype.
        indices: The experts that were selected, one tensor a layer, in the order of the batch.
        dtype: Half a precision.
    """
    model = build()
    truth, conventional = (dense(model, indices, estimator) for estimator in ("densemixer", "conventional"))
    allowed = 1.1 * worst(oracle.relative_error, reference, truth) + torch.finfo(dtype).eps
    difference = worst(oracle.relative_error, gradients, conventional, routers(conventional))
    return Result(worst(oracle.relative_error, gradients, truth), allowed, difference)


def routers(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith((".gate.weight", ".router.weight"))]


def worst(
    error: Callable[[Tensor, Tensor], float], gradients: Gradients, truth: Gradients, names: Iterable[str] | None = None
) -> float:
    assert gradients.keys() == truth.keys(), gradients.keys() ^ truth.keys()
    return max(error(gradients[name], truth[name]) for name in names or truth)


def checkpoint(model: Any, kind: str) -> None:
    """As users of transformers switch it on. Selective: the products of two-dimensional matrices are kept."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    model.gradient_checkpointing_enable(options)
    model.enable_input_require_grads()


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def chosen(cells: Iterable[tuple[str, Callable[[], Any]]], names: Sequence[str]) -> Cells:
    """Those with these names; without names all of them."""
    known = dict(cells)
    return {name: known[name] for name in names or known}


def run(cells: Cells, report: Path, write: bool = True) -> None:
    """Run cells one after the other.

    The report is JSON: for each cell its result, the message that it was refused with, or the error that stopped it.
    """
    results: dict[str, Any] = {}
    for name, cell in cells.items():
        try:
            result = cell()
            results[name] = {"refused": result} if isinstance(result, str) else dataclasses.asdict(result)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
        if write:
            print(name, results[name].get("failed") or results[name], flush=True)
            report.write_text(json.dumps(results))
