"""What a computation leaves in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Created(TorchDispatchMode):
    """The storages of all results of operations, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def living_bytes(compute: Callable[[], Any]) -> int:
    """Bytes of the storages that operations in ``compute`` made and that live as long as its result."""
    with _Created() as created:
        result = compute()
    living = sum(nbytes for reference, nbytes in created.storages.values() if not reference.expired())
    del result
    return living
