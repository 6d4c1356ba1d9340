"""The Mixture-of-Experts layers of a model, and why one can't be trained through all of its experts."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import Tensor, nn

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.original import refuse_patched
from densemixer_adapters.transformers.experts import is_stacked, unwrap, weight_names
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_adapters.transformers.parallel import distributed_model, sharing_ranks, why_not
from densemixer_adapters.transformers.routers import is_refused, left_to_the_host, router_of
from densemixer_adapters.transformers.weights import why_unreadable
from densemixer_core import DenseMixerConfig

logger = logging.getLogger("densemixer")

ROUTER_NAMES = ("gate", "router")


def find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, block and the name of its router ("" if it has none), of every Mixture-of-Experts layer."""
    for name, block in model.named_modules():
        # Its own modules: wrappers (torch.compile, FSDP1, activation checkpointing) lend out those of what they wrap.
        own = dict(block.named_children())
        router_name = next((name for name in ROUTER_NAMES if name in own), "")
        if is_refused(block) or (router_name and "experts" in own):
            yield name, block, router_name


def find_layers(model: nn.Module, config: DenseMixerConfig) -> Iterator[DenseMixerLayer]:
    blocks, left_out = [], {}
    for name, block, router_name in find_blocks(model):
        why = left_to_the_host(unwrap(block.get_submodule(router_name)))
        if why is None:
            blocks.append((name, block, router_name))
        else:
            left_out[name] = why
    if left_out:
        logger.warning(
            "DenseMixer leaves %s to conventional training: %s.", ", ".join(left_out), "; ".join({*left_out.values()})
        )
    if not blocks:
        return
    whole = distributed_model(model)
    for name, block, router_name in (blocks[position] for position in config.positions(len(blocks))):
        where = f"{name or type(model).__name__} ({type(block).__name__})"
        refuse_patched(block, where)
        router = unwrap(block.get_submodule(router_name))
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
                "become weights. Those that it knows are in densemixer_adapters/transformers/routers.py, and in "
                "docs/models.md by architecture. A newer densemixer-adapters may know it; otherwise switch DenseMixer "
                "off for this model."
            )
        experts = unwrap(block.get_submodule("experts"))
        if not is_stacked(experts) or not isinstance(getattr(experts, "down_proj", None), Tensor):
            raise UnsupportedModelError(
                f"{where}: its experts ({type(experts).__name__}) don't hold stacked weights as the models of "
                "transformers 5 do. Load the model with transformers >= 5.5.4, without quantisation, and without "
                "adapters that replace its experts; or switch DenseMixer off."
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
        yield DenseMixerLayer(name, block, router_name, spec, config, sharing_ranks(whole))
