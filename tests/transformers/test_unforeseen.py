"""What others do around a layer, inside of it and while it runs: the right gradient, or an error that says why not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from blocks import block_gradients, block_of, block_truth, data, tensor_of
from families import FAMILIES, tokens
from oracle import assert_close
from runs import gradients
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer, calls
from densemixer_adapters.transformers.checks import OutputMismatchError

IMPLEMENTATIONS = [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("kept", ["products", "multiplications"])
def test_selective_checkpointing_of_a_model(kept: str, family: str) -> None:
    """It replays what it keeps in the order of the first run: nothing of ours may run in one of the two alone."""
    operations = {
        "products": [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default],
        "multiplications": [torch.ops.aten.mul.Tensor],
    }
    model: Any = FAMILIES[family].build("eager")
    with apply_densemixer(model):
        plain = gradients(model)
    with apply_densemixer(model):  # whose first forward is compared
        inner = model.model.forward
        contexts = functools.partial(create_selective_checkpoint_contexts, operations[kept])
        model.model.forward = lambda *args, **kwargs: checkpoint(
            inner, *args, use_reentrant=False, context_fn=contexts, **kwargs
        )
        assert_close(gradients(model), {name: gradient.double() for name, gradient in plain.items()})


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("before", [False, True])
def test_what_changes_the_output_within_a_checkpoint_around_the_experts(before: bool, kind: CheckpointImpl) -> None:
    block: Any = block_of("mixtral")
    if before:
        block.experts.register_forward_pre_hook(lambda module, args: (*args[:2], args[2] * 0.5))
    else:
        block.experts.register_forward_hook(lambda module, args, output: output * 0.5)
    block.experts = checkpoint_wrapper(block.experts, kind)
    with apply_densemixer(block), pytest.raises(OutputMismatchError, match="experts"):
        block_gradients(block, *data())


def test_a_reentrant_checkpoint_of_the_blocks_own() -> None:
    block: Any = block_of("qwen3_moe")
    gate, experts = block.gate, block.experts

    def forward(hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, 64)
        _, weights, index = gate(x)
        return checkpoint(experts, x, index, weights, use_reentrant=True).reshape(hidden_states.shape)

    block.forward = forward
    with apply_densemixer(block), pytest.raises(UnsupportedModelError, match="reentrant checkpoint"):
        block_gradients(block, *data())


def test_masked_logits_hide_nothing() -> None:
    """Minus infinity is no number that says nothing."""
    block: Any = block_of("mixtral")

    def mask(gate: Any, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0].masked_fill(torch.arange(output[0].shape[-1]) == 3, -torch.inf)
        weights, index = logits.softmax(-1).topk(2, -1)
        return logits, weights / weights.sum(-1, keepdim=True), index

    block.gate.register_forward_hook(mask)
    experts = block.experts.forward
    with apply_densemixer(block):
        block_gradients(block, *data())
        block.experts.forward = lambda *args, **kwargs: 0.5 * experts(*args, **kwargs)
        with pytest.raises(OutputMismatchError, match=r"0\.5 times"):
            block_gradients(block, *data())


def test_a_hook_on_all_modules_that_comes_later() -> None:
    block: Any = block_of("mixtral")

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 0.5 if module is block.experts else None

    with apply_densemixer(block):
        block_gradients(block, *data())
        hook = register_module_forward_hook(scale)
        try:
            with pytest.raises(OutputMismatchError, match=r"0\.5 times"):
                block_gradients(block, *data())
        finally:
            hook.remove()


def test_a_hook_on_the_router_that_comes_while_the_block_runs() -> None:
    block: Any = block_of("qwen3_moe")

    def hook(gate: nn.Module, args: Any) -> None:
        gate.register_forward_hook(lambda gate, args, output: None)

    block.gate.register_forward_pre_hook(hook)
    with apply_densemixer(block), pytest.raises(UnsupportedModelError, match="while the block ran"):
        block_gradients(block, *data())


def test_removed_while_the_block_runs() -> None:
    block: Any = block_of("qwen3_moe")
    handle = apply_densemixer(block)
    block.gate.register_forward_hook(lambda *args: handle.remove())
    block_gradients(block, *data())
    assert not calls._calls


def test_a_checkpoint_inside_of_the_experts() -> None:
    of, (x, g) = FAMILIES["qwen3_moe"], data()
    block: Any = block_of("qwen3_moe")
    truth = block_truth(of, block, x, g, "densemixer")
    block.experts.act_fn = checkpoint_wrapper(block.experts.act_fn, CheckpointImpl.NO_REENTRANT)
    with apply_densemixer(block):
        assert_close(block_gradients(block, x, g), truth)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_router(when: str) -> None:
    of, (x, g) = FAMILIES["mixtral"], data()
    block: Any = block_of("mixtral")
    truth = block_truth(of, block, x, g, "densemixer")
    gate = block.gate
    if when == "before":
        block.gate = torch.compile(gate, backend="eager")
    with apply_densemixer(block):
        block.gate = torch.compile(gate, backend="eager")
        found = block_gradients(block, x, g)
    assert_close({name.replace("_orig_mod.", ""): gradient for name, gradient in found.items()}, truth)


@pytest.mark.parametrize("later", ["router", "experts"])
def test_hooks_that_come_after_compiling(later: str) -> None:
    """On the router they count; what changes the experts' output is an error. Both as without compiling."""
    x, g = data()
    block: Any = block_of("mixtral", "batched_mm")
    twin: Any = block_of("mixtral", "batched_mm")

    def hotter(gate: Any, args: Any, output: Any) -> Any:
        logits = output[0] / 2
        weights, index = logits.softmax(-1).topk(2, -1)
        return logits, weights / weights.sum(-1, keepdim=True), index

    with apply_densemixer(block), apply_densemixer(twin):
        block_gradients(block, x, g)
        block.compile(backend="eager")
        block_gradients(block, x, g)
        if later == "router":
            block.gate.register_forward_hook(hotter)
            twin.gate.register_forward_hook(hotter)
            expected = {name: gradient.double() for name, gradient in block_gradients(twin, x, g).items()}
            assert_close(block_gradients(block, x, g), expected)
        else:
            block.experts.register_forward_hook(lambda module, args, output: output * 0.5, prepend=True)
            with pytest.raises(OutputMismatchError, match=r"0\.5 times"):
                block_gradients(block, x, g)


def test_experts_under_a_parametrization_of_several_tensors() -> None:
    of, (x, g) = FAMILIES["mixtral"], data()
    block: Any = block_of("mixtral")
    truth = block_truth(of, block, x, g, "densemixer")
    weight_norm(block.experts, "down_proj")
    with apply_densemixer(block):
        ours = block_gradients(block, x, g)
    assert_close({"gate.weight": ours["gate.weight"]}, {"gate.weight": truth["gate.weight"]})


def test_experts_whose_terms_cancel() -> None:
    """Rounding goes with the terms, not with what is left of them."""
    block: Any = block_of("mixtral")
    with torch.no_grad():
        gate, up = block.experts.gate_up_proj.chunk(2, 1)
        for half in (gate, up):
            half[:, 1::2] = half[:, ::2] * 1.01
        block.experts.down_proj[..., 1::2] = -block.experts.down_proj[..., ::2]
    block.to(torch.bfloat16)
    x, g = data()
    with apply_densemixer(block):
        tensor_of(block(x.bfloat16())).backward(g.bfloat16())


def test_on_the_meta_device() -> None:
    model: Any = FAMILIES["qwen3_moe"].build("batched_mm").to("meta")
    with apply_densemixer(model):
        model(input_ids=tokens().to("meta")).logits.sum().backward()
