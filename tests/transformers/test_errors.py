"""Where DenseMixer can't work it says so: which module, why, and what to do."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from families import FAMILIES
from runs import gradients, loss_of
from torch import nn

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer, routers
from densemixer_core import RoutingMismatchError


def test_twice() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp .*attached already.*\.remove\(\)"):
            apply_densemixer(model)
        gradients(model)  # the first one still works


def test_a_model_without_moe_layers() -> None:
    options = {key: value for key, value in tiny_models.COMMON.items() if key != "num_experts_per_tok"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no Mixture-of-Experts layers"):
        apply_densemixer(model)


def test_an_unknown_router_leaves_no_hook_behind() -> None:
    model = FAMILIES["qwen3_moe"].build()

    class MyRouter(nn.Linear):
        pass

    model.model.layers[1].mlp.gate = MyRouter(64, 8)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.1\.mlp .*MyRouter is unknown.*routers\.py"
    ) as caught:
        apply_densemixer(model)
    assert len(str(caught.value)) < 500  # not the names of all that are known
    assert not any(module._forward_hooks for module in model.modules())


def test_a_subclass_of_a_known_router_is_known() -> None:
    model = FAMILIES["qwen3_moe"].build()
    gate = model.model.layers[0].mlp.gate
    gate.__class__ = type("MyRouter", (type(gate),), {})
    apply_densemixer(model).remove()


def test_experts_that_are_not_stacked() -> None:
    model = FAMILIES["qwen3_moe"].build()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(64, 64)])
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp .*\(ModuleList\).*transformers >= 5.5.4"):
        apply_densemixer(model)


@pytest.mark.parametrize("frozen", [[0], [0, 1]])
def test_a_frozen_router_warns_and_trains_conventionally(frozen: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["qwen3_moe"].build()
    for layer in frozen:
        model.model.layers[layer].mlp.gate.requires_grad_(False)
    conventional = gradients(model)
    with apply_densemixer(model):
        ours = gradients(model)
        gradients(model)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "model.layers.0.mlp.gate" in warnings[0]
    assert 'modules_to_save=["mlp.gate"]' in warnings[0]
    assert ("gate and 1 more" in warnings[0]) == (len(frozen) == 2)
    assert len(warnings) == 1
    if len(frozen) == 2:
        assert all(torch.equal(ours[name], conventional[name]) for name in conventional)


def test_routers_that_are_frozen_later_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        assert not caplog.records
        for layer in model.model.layers:
            layer.mlp.gate.requires_grad_(False)
        gradients(model)
        gradients(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "model.layers.0.mlp.gate and 1 more" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (routers.Router("sigmoid", True), "the sigmoid of its logits, its weights are not proportional"),
        (routers.Router("softmax", False), "their ratio to the scores differs between tokens"),
    ],
)
def test_a_wrong_declaration_stops_the_first_step(
    declared: routers.Router, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(routers.ROUTERS, "Qwen3MoeTopKRouter", declared)
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        with torch.no_grad():
            loss_of(model)
        for _ in range(2):  # not only at the first attempt
            with pytest.raises(RoutingMismatchError) as caught:
                loss_of(model)
            assert "model.layers.0.mlp.gate (Qwen3MoeTopKRouter)" in str(caught.value)
            assert message in str(caught.value)


def test_a_block_whose_forward_is_replaced() -> None:
    """What a hub kernel for the whole block does."""
    model = FAMILIES["gpt_oss"].build()
    block: Any = model.model.layers[1].mlp
    block.forward = lambda x: (x, None)
    with apply_densemixer(model):
        with torch.no_grad():
            loss_of(model)
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp: .*use_kernels=False"):
            loss_of(model)


def test_experts_without_their_router() -> None:
    model = FAMILIES["qwen3_moe"].build()
    block: Any = model.model.layers[0].mlp
    gate = block.gate.forward

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, 64)
        _, weights, index = gate(x)
        return block.experts(x, index, weights).reshape(hidden_states.shape)

    block.forward = forward
    with apply_densemixer(model), pytest.raises(UnsupportedModelError, match=r"`model\.layers\.0\.mlp\.gate`"):
        loss_of(model)


def test_a_part_of_the_experts() -> None:
    """What expert parallelism leaves in a process."""
    model = FAMILIES["qwen3_moe"].build()
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda module, args, output: None)
    with apply_densemixer(model):
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, nn.Parameter(getattr(experts, name)[:4].detach()))
        experts.forward = lambda x, index, weights: x * weights.sum(-1, keepdim=True)
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp: .*4 of 8 experts.*expert parallelism"):
            loss_of(model)
