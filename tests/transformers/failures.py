"""Errors in the middle of a forward, at each place of a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from families import Family
from torch import nn

Stop = Callable[..., None]


def fail_in_router(block: Any, router: nn.Module, stop: Stop) -> Any:
    return router.register_forward_pre_hook(stop)


def fail_after_router(block: Any, router: nn.Module, stop: Stop) -> Any:
    return router.register_forward_hook(stop)


def fail_in_experts(block: Any, router: nn.Module, stop: Stop) -> Any:
    return block.experts.register_forward_pre_hook(stop)


def fail_after_experts(block: Any, router: nn.Module, stop: Stop) -> Any:
    return block.experts.register_forward_hook(stop)


def fail_after_block(block: Any, router: nn.Module, stop: Stop) -> Any:
    return block.register_forward_hook(stop)


FAILURES = [fail_in_router, fail_after_router, fail_in_experts, fail_after_experts, fail_after_block]


@contextlib.contextmanager
def failing(
    family: Family, model: nn.Module, fail: Callable[..., Any], error: type[BaseException] = torch.OutOfMemoryError
) -> Iterator[None]:
    """The last layer but one fails, where ``fail`` says. The error doesn't leave this, but there must be one."""

    def stop(*args: Any) -> None:
        raise error

    block = family.blocks(model)[-2]
    hook = fail(block, getattr(block, family.router), stop)
    try:
        yield
    except error:
        pass
    else:
        raise AssertionError("nothing failed")
    finally:
        hook.remove()
