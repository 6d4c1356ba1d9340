"""What a computation leaves in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class _Created(TorchDispatchMode):
    """The storages that operations make, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, StorageWeakRef] = {}
        self.made: dict[int, int] = {}  # bytes
        self.peak = 0
        self._bound = 0  # on the bytes that live now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass, tree_leaves((args, kwargs)))):
            return NotImplemented  # the operations that it consists of come here by themselves
        for key, storage in self._new((args, kwargs)):
            self.known[key] = StorageWeakRef(storage)
            self.made.pop(key, None)
        result = func(*args, **(kwargs or {}))
        for key, storage in self._new(result):
            self.known[key] = StorageWeakRef(storage)
            self.made[key] = storage.nbytes()
            self._bound += storage.nbytes()
        if self._bound > 1.01 * self.peak:  # looking what has died takes long
            self._bound = self.living()
            self.peak = max(self.peak, self._bound)
        return result

    def _new(self, values: Any) -> Iterator[tuple[int, UntypedStorage]]:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value):
                storage = value.untyped_storage()
                reference = self.known.get(storage._cdata)
                if reference is None or reference.expired():  # an address may come twice
                    yield storage._cdata, storage

    def living(self) -> int:
        self.made = {key: nbytes for key, nbytes in self.made.items() if not self.known[key].expired()}
        return sum(self.made.values())


def living_bytes(compute: Callable[[], Any]) -> int:
    """Bytes of the storages that operations in ``compute`` made and that live as long as its result."""
    with _Created() as created:
        result = compute()
    living = created.living()
    del result
    return living


def peak_bytes(compute: Callable[[], Any]) -> int:
    """The most bytes that live at a time during ``compute``, of the storages that its operations make, to 1 %."""
    with _Created() as created:
        compute()
    return created.peak
