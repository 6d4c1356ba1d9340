"""The forward of a block that is under way in this thread, and the hooks by which its router and experts report to it.

What a layer needs to know of one forward lives in its `Call`: from the block's first hook to its last, which runs after
an exception too. Nothing is left when the block is left, and two threads that train one model don't see each other's.
The hooks on routers and experts are plain functions: a copied module takes them along, and they do nothing there until
a block with a layer of its own calls it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from densemixer_adapters.expert_parallel import Spread
from densemixer_adapters.transformers.experts import stacked_within
from densemixer_core import StackedExperts


class Layer(Protocol):
    """What a call knows of its layer of DenseMixer."""

    router_attribute: str

    def after_experts(
        self, call: Call, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any: ...


Recorder = Callable[[Any, Tensor, Tensor], None]
"""Called with the layer, its router's output, [tokens, experts], and the selected experts, [tokens, k]."""


class Call:
    """One forward of a block.

    Attributes:
        layer: The layer of DenseMixer that the block has.
        block: The block; under DataParallel one of its replicas.
        trains: Whether this forward gets DenseMixer's gradient, or an observer.
        router: The router as the block calls it now, with all that has been wrapped around it.
        experts: Likewise the experts.
        inner: The modules within `experts` that hold stacked weights: one, or one for each copy of `modules_to_save`.
        site: Where the experts' output is taken: None for at the inner module itself, before all hooks of others. In an
            activation checkpoint around the experts alone the graph is made anew, so there it is the checkpoint.
        outer: The call around this one.
        router_input, router_output: Once the router has run.
        stacked: The experts, once they have run, if DenseMixer computes with them.
        spread: How they are spread over ranks, likewise; None if this one has them all.
        signature: See `checks.signature`.
        checks: Whether this forward is compared with what DenseMixer takes the layer for.
        compares: Whether its output is, where the experts are spread over ranks.
        done: Whether the experts have run.
    """

    def __init__(self, layer: Layer, block: nn.Module, trains: bool, outer: Call | None) -> None:
        self.layer = layer
        self.block = block
        self.trains = trains
        self.router: nn.Module = getattr(block, layer.router_attribute)
        self.experts: nn.Module = block.get_submodule("experts")
        self.inner, self.site = stacked_within(self.experts)
        self.outer = outer
        self.router_input: Tensor | None = None
        self.router_output: Tensor | None = None
        self.stacked: StackedExperts | None = None
        self.spread: Spread | None = None
        self.signature: tuple[Any, ...] | None = None
        self.checks = False
        self.compares = False
        self.done = False

    @property
    def hooked(self) -> list[nn.Module]:
        """Where the experts' hook belongs."""
        return self.inner if self.site is None else [*self.inner, self.site]


logger = logging.getLogger("densemixer")

_calls: dict[int, Call] = {}
_recorders: dict[int, Recorder] = {}
_warned_of: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _thread() -> int:
    """This thread. torch.compile can't look into a `threading.local`; to compiled code it is the thread that traced."""
    return threading.get_ident()


def under_way() -> Call | None:
    """The innermost call of this thread."""
    return _calls.get(_thread())


def recorder() -> Recorder | None:
    """Who records the routing of this thread's forwards without gradients."""
    return _recorders.get(_thread())


@contextmanager
def recording(to: Recorder) -> Iterator[None]:
    """Have this thread's forwards without gradients report their routing."""
    _recorders[_thread()] = to
    try:
        yield
    finally:
        del _recorders[_thread()]


def begin(call: Call) -> None:
    _calls[_thread()] = call


def drop_interrupted(block: nn.Module) -> Call | None:
    """End the calls that a KeyboardInterrupt has left, which runs no hooks: those whose block doesn't contain this one.

    Returns:
        The call within which the block is called, if there is one.
    """
    call = under_way()
    while call is not None and (call.block is block or all(module is not block for module in call.block.modules())):
        call = end(call.block) and under_way()
    return call


def end(block: nn.Module) -> Call | None:
    """The call of this block, which is over; None if it had none."""
    call = under_way()
    if call is None or call.block is not block:
        return None
    if call.outer is None:
        del _calls[_thread()]
    else:
        _calls[_thread()] = call.outer
    return call


def after_router(router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    call = under_way()
    # Without gradients in a forward that trains: somebody looks at the router in between.
    if call is not None and router is call.router and (torch.is_grad_enabled() or not call.trains):
        call.router_output = output[0] if isinstance(output, tuple | list) else output
        call.router_input = args[0] if args else None


def after_experts(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call = under_way()
    if call is None:
        _warn_of_experts_alone(experts, output)
        return None
    if not (experts is call.site or any(experts is inner for inner in call.inner)):
        return None
    return call.layer.after_experts(call, experts, args, kwargs, output)


def _warn_of_experts_alone(experts: nn.Module, output: Any) -> None:
    """Log one warning for experts that train outside of their block's call, as after ``block.forward(x)``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or experts in _warned_of:
        return
    if not output.requires_grad or torch._C._current_graph_task_id() != -1:  # a checkpoint's recomputation
        return
    _warned_of.add(experts)
    logger.warning(
        "DenseMixer adds nothing where experts (%s) are called by themselves, or through their block's `forward` "
        "instead of the block: such a call trains as without DenseMixer. Call the block as a module.",
        type(experts).__name__,
    )


def attach(call_router: nn.Module, experts: Sequence[nn.Module]) -> None:
    """See to it that the router's hook comes last, and that the experts have theirs.

    The router's is moved behind those that came since: they may change what is selected. The experts' is put before all
    that are there: those of FSDP and ZeRO-3 bring the weights back for what lies below them in the graph, those of
    bitsandbytes drop the dequantised weights, and what others make of the output is no affair of the experts.
    """
    hooks = call_router._forward_hooks
    key = next((key for key, hook in hooks.items() if hook is after_router), None)
    if key is None:
        for module in call_router.modules():  # what has been wrapped since
            remove_hook(module, next((key for key, hook in module._forward_hooks.items() if hook is after_router), -1))
        call_router.register_forward_hook(after_router)
    elif next(reversed(hooks)) != key:
        hooks.move_to_end(key)  # type: ignore[attr-defined]  # an OrderedDict
    for module in experts:
        if not any(hook is after_experts for hook in module._forward_hooks.values()):
            module.register_forward_hook(after_experts, prepend=True, with_kwargs=True)


def is_last(router: nn.Module) -> bool:
    """Whether our hook is the router's last one."""
    hooks = list(router._forward_hooks.values())
    return bool(hooks) and hooks[-1] is after_router


def is_first(experts: Sequence[nn.Module]) -> bool:
    """Whether our hook is the first one of all of these."""
    places = [list(module._forward_hooks.values()) for module in experts]
    return all(hooks and hooks[0] is after_experts for hooks in places)


def detach(block: nn.Module) -> None:
    """Take the hooks off all modules within a block, those of copies that others have made of them included.

    If the block is running, what is under way there is dropped.
    """
    if (call := under_way()) is not None and call.block is block:
        end(block)
    for module in block.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is after_router or hook is after_experts:
                remove_hook(module, key)


def remove_hooks_of(owner: object, module: nn.Module) -> None:
    """Remove the hooks of a module that are methods of an object."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is owner:
                remove_hook(module, key)


def remove_hook(module: nn.Module, key: int) -> None:
    """Remove a hook of which there is no handle, as on a copied module."""
    for hooks in (
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
    ):
        hooks.pop(key, None)
