"""What DenseMixer can't work with in a layer of a model of transformers: when it is attached, and in a forward.

Each function raises an `UnsupportedModelError` that names the layer, the reason and the fix, or does nothing.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.transformers import calls
from densemixer_adapters.transformers.calls import Call
from densemixer_adapters.transformers.experts import is_stacked, weight_names
from densemixer_adapters.transformers.parallel import why_not
from densemixer_adapters.transformers.routers import Router, line_to_register, router_of
from densemixer_adapters.transformers.weights import adapter_apart, why_unreadable
from densemixer_core import Derivation, ExpertWeights


def known_router(where: str, router: nn.Module, block: nn.Module) -> Router:
    """What is declared for a block's router, or an error where it is unknown or can't be trained.

    Args:
        where: The block's name and class, for the message; likewise below.
        router, block: The host's own, without wrappers.
    """
    try:
        spec = router_of(router, block)
    except LookupError as refused:
        raise UnsupportedModelError(
            f"{where}: DenseMixer can't train it: {refused.args[0]}. Switch DenseMixer off for this model, or "
            "leave the layer out with the option `layers`."
        ) from None
    if spec is None:
        raise UnsupportedModelError(
            f"{where}: its router {type(router).__name__} is unknown to DenseMixer, which must know how scores "
            "become weights. If it is your own, declare it first (docs/own-router.md): "
            f"`{line_to_register(router, block)}`, both from densemixer_adapters.transformers. If it is one of "
            "transformers that isn't in densemixer_adapters/transformers/routers.py, a newer densemixer-adapters "
            "may know it. Or switch DenseMixer off for this model."
        )
    if missing := spec.missing(router, block):
        raise UnsupportedModelError(
            f"{where}: the declaration of its router {type(router).__name__} names {', '.join(map(repr, missing))}, "
            "and there is no such attribute. Correct what register_router says of it."
        )
    return spec


def refuse_experts(where: str, experts: nn.Module, whole: Any | None) -> None:
    """Experts whose weights can't be read, or which are spread over ranks in a way that DenseMixer can't follow.

    Args:
        experts: The host's own module, without wrappers.
        whole: The model that transformers has distributed, if there is one.
    """
    if not is_stacked(experts) or not isinstance(getattr(experts, "down_proj", None), Tensor):
        raise UnsupportedModelError(
            f"{where}: its experts ({type(experts).__name__}) don't hold stacked weights as the models of "
            "transformers 5 do. Load the model with transformers >= 5.5.4, without quantisation, and without "
            "adapters that replace its experts; decorate experts of your own with transformers' "
            "use_experts_implementation (docs/own-router.md); or switch DenseMixer off."
        )
    if reason := why_unreadable(experts, weight_names(experts)):
        raise UnsupportedModelError(
            f"{where}: of its experts ({type(experts).__name__}), {reason}, so DenseMixer can't compute with them. "
            "Load the model with dequantize=True in its quantisation config or without quantising the experts, or "
            "switch DenseMixer off."
        )
    if refusal := why_not(whole, experts):
        reason, fix = refusal
        raise UnsupportedModelError(f"{where}: {reason}. Either {fix}, or switch DenseMixer off.")


def refuse_forward(name: str, call: Call) -> None:
    """A training forward that DenseMixer can't follow, as it begins."""
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedModelError(
            f"{name}: DenseMixer doesn't work within torch.func (grad, vmap, functional_call under them). Use "
            "torch.autograd instead, or call handle.remove() first."
        )
    if not call.inner:
        raise UnsupportedModelError(
            f"{name}: its experts are now a {type(call.experts).__name__}, which holds no stacked weights. "
            "Something has replaced them since DenseMixer was attached; undo that, or switch DenseMixer off."
        )


def refuse_moved_hooks(name: str, call: Call) -> None:
    """Hooks that others have registered since, where ours can't be moved: in a graph that is being compiled."""
    if not (calls.is_last(call.router) and calls.is_first(call.hooked)):
        raise UnsupportedModelError(
            f"{name}: somebody has registered hooks on its router or experts since. Run one step before "
            "you compile it with fullgraph=True."
        )


def refuse_other_router(router_name: str, router: nn.Module, lacks: AttributeError) -> NoReturn:
    """Another module in the router's place, which lacks what is declared of the router."""
    raise UnsupportedModelError(
        f"{router_name} ({type(router).__name__}): {lacks}, so this isn't the router that DenseMixer was attached to. "
        "Change or wrap the router first, then call apply_densemixer; or call handle.remove()."
    ) from None


def refuse_unseen_router(name: str, router_name: str, call: Call) -> None:
    """Experts that run where the router hasn't been seen, or not as it is."""
    if call.router_output is None:
        raise UnsupportedModelError(
            f"{name}: the experts ran without their router `{router_name}` having been called as a module"
            ", so DenseMixer can't see the scores. Something replaced the block's forward; remove that, or switch "
            "DenseMixer off."
        )
    if not calls.is_last(call.router):
        raise UnsupportedModelError(
            f"{name}: a hook was registered on its router `{router_name}` while the block ran, so "
            "DenseMixer has seen the router's output before it. Register it before the block is called."
        )


def refuse_weights(name: str, weights: ExpertWeights, derivation: Derivation | None, spread: bool, meta: bool) -> None:
    """Weights that aren't there, or of which this rank has a part that can't be computed again.

    Args:
        weights, derivation: As read in the experts' forward.
        spread: Whether the experts are spread over ranks.
        meta: Whether the tokens have no numbers either.
    """
    if weights.down.is_meta and not meta:
        raise UnsupportedModelError(
            f"{name}: the weights of its experts are not there after their forward: accelerate offloads them "
            "(a device_map with `cpu` or `disk`, or cpu_offload). Load the model without, or offload with FSDP2 or "
            "ZeRO-3; or switch DenseMixer off."
        )
    if spread and derivation is not None:
        raise UnsupportedModelError(
            f"{name}: its experts are spread over ranks, and their weights are computed from others (LoRA "
            "on them, or quantisation). DenseMixer doesn't work with both; train the experts in full or not at "
            "all, or switch DenseMixer off."
        )


def refuse_scores(name: str, scored: int, held: int, spec: Router) -> None:
    """A router that scores more experts than have weights, or fewer.

    Args:
        scored: How many numbers it returned for each token.
        held: How many experts have weights, on all ranks together.
        spec: What is declared of it.
    """
    if scored < held:
        raise UnsupportedModelError(
            f"{name}: its router returns {scored} numbers a token first, not the scores of {held} experts. "
            "Newer versions of transformers return them: upgrade. A router of your own must return its logits first. "
            "Or switch DenseMixer off."
        )
    if scored > held and spec.further is None:
        raise UnsupportedModelError(
            f"{name}: this process holds {held} of {scored} experts, and nothing says which. DenseMixer works "
            "with the expert parallelism of transformers by distributed_config, and with VeOmni's; use that, load "
            "the model without expert parallelism, or switch DenseMixer off."
        )


def refuse_adapter_apart(name: str, outer: nn.Module, experts: nn.Module) -> None:
    """LoRA on experts that the running forward leaves to a kernel.

    Args:
        outer: The experts in their wrappers.
        experts: The host's own module, in its forward: PEFT takes its adapter out of the weights afterwards.
    """
    if weight := adapter_apart(outer, experts):
        raise UnsupportedModelError(
            f"{name}: PEFT's LoRA on `{weight}` of its experts isn't in that weight while they run, since a "
            "kernel computes it apart (ScatterMoE and SonicMoE of Axolotl do), so DenseMixer can't see it. Train "
            "the experts in full or not at all, choose another kernel (in Axolotl, drop use_scattermoe and "
            "use_sonicmoe), or switch DenseMixer off."
        )


def refuse_freed_weights(name: str, weights: ExpertWeights) -> None:
    """Weights whose memory has been given back before the experts' output is taken."""
    if not all(weight.untyped_storage().size() for weight in (weights.up, weights.down)):
        raise UnsupportedModelError(
            f"{name}: the weights of its experts are gone after the activation checkpoint around them, since "
            "FSDP or ZeRO-3 shards them inside of it. Wrap them the other way round: the checkpoint inside."
        )


def refuse_unfollowed(name: str, args: tuple[Any, ...]) -> None:
    """A training forward of the block, with tokens, in which the experts weren't seen.

    Args:
        args: What the block was called with.
    """
    if any(isinstance(argument, Tensor) and not argument.numel() for argument in args):
        return
    raise UnsupportedModelError(
        f"{name}: its forward ran without calling `experts` as a module, or called them without gradients, so "
        "DenseMixer had no effect. A kernel that replaces the whole block does this: load the model with "
        "use_kernels=False. A reentrant checkpoint within the block's forward does: checkpoint the block, or wrap "
        "the experts by torch's checkpoint_wrapper. Experts that are compiled apart from their block do, and a "
        "compiled block in another thread: compile the block or the model, in the thread that trains. Or switch "
        "DenseMixer off."
    )
