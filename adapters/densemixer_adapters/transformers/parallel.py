"""How the parallelism of transformers itself spreads a layer's experts over ranks, and what DenseMixer refuses of it.

Since 5.23, ``from_pretrained(distributed_config=DistributedConfig(...))`` makes the experts' parameters DTensors on a
mesh with a dimension ``ep`` (each rank holds some of the experts) or ``tp`` (a part of the width of each). FSDP, which
shards them over a further dimension, brings that back for the forward and the backward of the layer. What a hook on
``experts`` sees are this rank's tokens, the positions among all experts, and the whole output.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from densemixer_adapters.expert_parallel import Spread
from densemixer_core import ExpertWeights

_MEGAMOE = "deepgemm_megamoe"


def distributed_models(model: nn.Module) -> dict[nn.Module, Any]:
    """By each module of the models within that transformers has distributed: its model.

    There may be several, with a way of their own each.
    """
    owners: dict[nn.Module, Any] = {}
    for whole in model.modules():
        if vars(whole).get("_mesh_manager") is not None:
            for module in whole.modules():
                owners.setdefault(module, whole)
    return owners


def why_not(whole: Any | None, experts: nn.Module) -> tuple[str, str] | None:
    """Why DenseMixer doesn't work with the way in which a layer's experts are spread, and what to do; None if it does.

    Args:
        whole: The model that transformers has distributed, if they belong to one.
        experts: The module with the stacked weights.
    """
    # Until 5.23; the weights stay plain tensors that do not say what they are of. PEFT marks sharded ones so, too.
    if hasattr(experts, "_hf_tp_plan") and _dimension(experts) is None:
        return (
            "transformers has split its experts between processes by tp_plan. DenseMixer works with the tensor and "
            "expert parallelism of transformers from 5.23 on",
            "upgrade and use distributed_config, or load the model without tp_plan and enable_expert_parallel (DDP, "
            "FSDP and ZeRO work)",
        )
    if whole is not None and whole._mesh_manager.get_mesh("pp").size() > 1:
        return "transformers' pipeline parallelism (pp_size) has no backward", "load the model without pp_size"
    if _dimension(experts) != "ep":
        return None
    if whole is None:
        return (
            "its experts are spread over ranks, and only the whole model knows which ranks have the same tokens",
            "call apply_densemixer on the model that from_pretrained returned",
        )
    if _MEGAMOE in (
        getattr(whole.config.distributed_config, "ep_implementation", None),
        getattr(getattr(experts, "config", None), "_experts_implementation", None),
    ):
        return "the kernels of DeepGEMM Mega MoE have no backward", "choose another ep_implementation and experts"
    tp, ep = (dist.get_process_group_ranks(whole._mesh_manager.get_mesh(name).get_group()) for name in ("tp", "ep"))
    first = ep.index(tp[0]) if tp[0] in ep else 0
    if ep[first : first + len(tp)] != tp or first % len(tp):
        return (
            "the ranks that have the same tokens don't lie one after the other in the group that its experts are "
            "spread over",
            "use the meshes that DistributedConfig makes",
        )
    return None


def sharing_ranks(whole: Any | None) -> int:
    """How many ranks, one after the other, have the same tokens.

    Args:
        whole: The model that transformers has distributed, or None.
    """
    return 1 if whole is None else int(whole._mesh_manager.get_mesh("tp").size())


def spread_of(weight: Tensor, sharing: int) -> Spread | None:
    """How the experts are spread, from one of their weights as it is in the forward; None if they aren't."""
    if not isinstance(weight, DTensor):
        return None
    mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ()
    name = next((name for name in ("ep", "tp") if name in names), None)
    if name is None:
        return None
    group, count = mesh.get_group(name), weight.shape[0]
    ranks = dist.get_world_size(group)
    shared = sharing if name == "ep" else ranks
    if not weight.placements[names.index(name)].is_shard(0):  # a part of the width of each
        return Spread(group, range(count), count, shared)
    first = count // ranks * dist.get_rank(group)
    return Spread(group, range(first, first + count // ranks), count, shared)


def local_weights(weights: ExpertWeights) -> ExpertWeights:
    """This rank's parts of them. They share their memory, which FSDP frees after the forward, and fills again."""
    return ExpertWeights(*(_local(weight) for weight in weights))  # type: ignore[arg-type]  # None where it was


def _local(weight: Tensor | None) -> Tensor | None:
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return None if local is None else local.detach()


def _dimension(experts: nn.Module) -> str | None:
    """The dimension of the mesh that the experts are spread over, ``ep`` or ``tp``."""
    names: set[str] = set()
    for parameter in experts.parameters():
        names.update(getattr(getattr(parameter, "device_mesh", None), "mesh_dim_names", None) or ())
    return next((name for name in ("ep", "tp") if name in names), None)
