"""Mixture-of-Experts layers that come into a model after DenseMixer has been attached to it, and train without it.

Such a layer has no hook of ours, so no forward can tell. torch tells of each module that is put into another one, but
for `ModuleList.insert`. Its hook is for the whole process: it is set once and stays, since to take it away while
another thread or the garbage collector is at work would break somebody's iteration over such hooks. Without a model to
watch it does nothing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from densemixer_adapters.transformers.find import find_blocks


class _Watch(NamedTuple):
    model: weakref.ref[nn.Module]
    is_attached: Callable[[nn.Module], bool]
    tell: weakref.WeakMethod[Callable[[str], None]]


_watches: dict[object, _Watch] = {}


def watch(
    model: nn.Module, is_attached: Callable[[nn.Module], bool], tell: Callable[[str], None]
) -> Callable[[], object]:
    """Tell of each layer that somebody puts into the model, in place of another or beside it.

    What stands in the model already may be wrapped or moved.

    Args:
        model: The model.
        is_attached: Whether DenseMixer is attached to a Mixture-of-Experts layer, as it is to a copied one.
        tell: A method, called with the layer's name and class. Neither its owner nor the model lives longer for this.

    Returns:
        What ends it. It ends with the model as well.
    """
    _set_hook()
    key = object()
    _watches[key] = _Watch(weakref.ref(model), is_attached, weakref.WeakMethod(tell))
    return weakref.finalize(model, _watches.pop, key, None)


@functools.cache
def _set_hook() -> None:
    register_module_module_registration_hook(_arrives)


def _arrives(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """A module is about to be put into its parent."""
    if not _watches or module is None:
        return
    blocks = list(find_blocks(module))
    for watched in list(_watches.values()) if blocks else ():
        model, tell = watched.model(), watched.tell()
        strangers = [(where, block) for where, block, _ in blocks if not watched.is_attached(block)]
        if not strangers or model is None or tell is None:
            continue
        names = {found: within for within, found in model.named_modules()}
        if parent not in names:  # another model, or what holds this one and others
            continue
        for where, block in strangers:
            if block not in names:
                tell(f"{'.'.join(filter(None, (names[parent], name, where)))} ({type(block).__name__})")
