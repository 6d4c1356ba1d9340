"""The Mixture-of-Experts layers of a model that are trained through all of their experts."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from densemixer_adapters.original import refuse_patched
from densemixer_adapters.transformers.experts import unwrap
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_adapters.transformers.parallel import distributed_models, sharing_ranks
from densemixer_adapters.transformers.refuse import known_router, refuse_experts
from densemixer_adapters.transformers.routers import is_refused, left_to_the_host
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
    """The layers to attach to, in the model's order.

    Raises:
        UnsupportedModelError: One of them can't be trained through all of its experts. The message names it.
        ValueError: The options select layers that the model doesn't have.
    """
    blocks = _not_left_to_the_host(model)
    if not blocks:
        return
    distributed = distributed_models(model)
    for name, block, router_name in (blocks[position] for position in config.positions(len(blocks))):
        where = f"{name or type(model).__name__} ({type(block).__name__})"
        refuse_patched(block, where)
        whole = distributed.get(block)
        spec = known_router(where, unwrap(block.get_submodule(router_name)), block)
        refuse_experts(where, unwrap(block.get_submodule("experts")), whole)
        yield DenseMixerLayer(name, block, router_name, spec, config, sharing_ranks(whole))


def _not_left_to_the_host(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """What `find_blocks` finds, without layers that train conventionally, of which a warning tells."""
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
    return blocks
