"""What others put around a model, before or after DenseMixer: its gradients are the oracle's, or it is refused.

`tests/running` has Liger, and torch.compile on layers and models; test_peft has PEFT, test_errors replaced forwards.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import oracle
import pytest
import torch
from families import FAMILIES
from runs import gradients, loss_of, selections
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer

accelerate = pytest.importorskip("accelerate", reason="needs accelerate; run `nox -s transformers`")

FAMILY = FAMILIES["qwen3_moe"]


def prepare(model: Any) -> None:
    accelerate.Accelerator(cpu=True).prepare(model)


def place(model: Any) -> None:
    """As a device_map does: forwards are replaced by some that move inputs to the device of each module."""
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def hook_each_module(model: Any) -> None:
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


def wrap_blocks(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp = wrap(layer.mlp)

    return patch


def compile_parts(names: Iterable[str]) -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        for layer in model.model.layers:
            for name in names:
                layer.mlp.get_submodule(name).compile(backend="aot_eager")

    return patch


def compile_forwards(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="aot_eager")


PATCHES: dict[str, Callable[[Any], None]] = {
    "accelerate, prepare": prepare,
    "accelerate, device_map": place,
    "accelerate, a hook on each module": hook_each_module,
    "torch.compile around blocks": wrap_blocks(lambda block: torch.compile(block, backend="aot_eager")),
    "torch.compile of blocks' forwards": compile_forwards,
    "torch.compile of routers and experts": compile_parts(["gate", "experts"]),
    "activation checkpointing around blocks": wrap_blocks(checkpoint_wrapper),
}


def plain(names: Iterable[str]) -> list[str]:
    return [name.replace("._orig_mod", "").replace("._checkpoint_wrapped_module", "") for name in names]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patch", PATCHES)
def test_gradients(patch: str, when: str) -> None:
    torch._dynamo.reset()
    model: Any = FAMILY.build()
    with selections(FAMILY, model) as indices, torch.no_grad():
        loss_of(model)
    with oracle.Float64():
        truth = gradients(FAMILY.oracle(model, indices, "densemixer"))
    if when == "after":
        PATCHES[patch](model)
    handle = apply_densemixer(model)
    if when == "before":
        PATCHES[patch](model)
    ours = gradients(model)
    assert plain(layer.name for layer in handle.layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert plain(ours) == list(truth)
    for found, (name, expected) in zip(ours.values(), truth.items(), strict=True):
        assert oracle.worst_error(found, expected) <= 1e-5, name


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_accelerate_offloads_are_refused(when: str) -> None:
    """The experts alone, whose routers could train."""
    model: Any = FAMILY.build()
    handle = apply_densemixer(model) if when == "before" else None
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", offload=True)
        accelerate.hooks.add_hook_to_module(layer.mlp.experts, hook)
    handle = handle or apply_densemixer(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp: .*accelerate offloads them.*FSDP2"):
        loss_of(model)
    handle.remove()
    loss_of(model).backward()


def test_unsloth_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name alone: its models can't be loaded without a GPU."""
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    model = FAMILY.build()
    with pytest.raises(UnsupportedModelError, match=r"Unsloth has been imported .* Train without `import unsloth`"):
        apply_densemixer(model)
    assert not any(module._forward_hooks for module in model.modules())
