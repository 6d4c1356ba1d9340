"""Wrong arguments and odd environments: what is wrong and what to write instead; and a model that is as it was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import KINDS
from families import FAMILIES
from runs import gradients, loss_of
from test_handle import traces
from torch import nn

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer, attached_layers
from densemixer_core import DenseMixerConfig


@pytest.fixture
def model() -> nn.Module:
    return FAMILIES["qwen3_moe"].build()


@pytest.mark.parametrize(
    "options", [{"estimator": "centered"}, {}, {"estimator": "none such"}, {"estimatr": "centered"}], ids=str
)
def test_options_as_a_mapping(model: nn.Module, options: dict[str, Any]) -> None:
    before = traces(model)
    with pytest.raises(TypeError, match=r"DenseMixerConfig\.from_dict"):
        apply_densemixer(model, options)  # type: ignore[arg-type]
    assert traces(model) == before


@pytest.mark.parametrize("options", ["centered", True, 0, DenseMixerConfig, ["centered"]], ids=str)
def test_options_that_are_none(model: nn.Module, options: Any) -> None:
    before = traces(model)
    with pytest.raises(TypeError, match="DenseMixerConfig"):
        apply_densemixer(model, options)
    assert traces(model) == before


NO_MODELS = [None, "Qwen/Qwen3-30B-A3B", DenseMixerConfig(), nn.Linear, [nn.Linear(2, 2)], {}]


@pytest.mark.parametrize("what", NO_MODELS, ids=lambda what: type(what).__name__)
def test_no_model(what: Any) -> None:
    with pytest.raises(TypeError, match="model"):
        apply_densemixer(what)


def test_model_and_options_in_the_wrong_order(model: nn.Module) -> None:
    before = traces(model)
    with pytest.raises(TypeError, match="model"):
        apply_densemixer(DenseMixerConfig(), model)  # type: ignore[arg-type]
    assert traces(model) == before


@pytest.mark.parametrize("rank", ["abc", "", " ", "0", "00", "-1", "1.5", "None"])
def test_an_odd_rank_in_the_environment(
    model: nn.Module, rank: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says at most how loud the log is."""
    caplog.set_level(logging.INFO, "densemixer")
    with apply_densemixer(model):
        expected = gradients(model)
    caplog.clear()
    monkeypatch.setenv("RANK", rank)
    with apply_densemixer(model) as handle:
        assert attached_layers(model) == handle.layers
        found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if rank != "-1":
        assert "attached to 2 layers" in caplog.text


def test_other_ranks_are_quiet(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "densemixer")
    monkeypatch.setenv("RANK", "3")
    apply_densemixer(model).remove()
    assert not caplog.records


def no_such_layer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_densemixer(model, DenseMixerConfig(layers=[7]))


def log_that_fails(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError("such as a full disk")

    logger = logging.getLogger("densemixer")
    monkeypatch.setattr(logger, "filters", [refuse])
    logger.setLevel(logging.INFO)
    try:
        apply_densemixer(model)
    finally:
        logger.setLevel(logging.NOTSET)


def warning_that_is_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen routers warn after the layers are attached."""
    model.model.layers[1].mlp.gate.requires_grad_(False)

    def refuse(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            raise ValueError("no warnings here")
        return True

    monkeypatch.setattr(logging.getLogger("densemixer"), "filters", [refuse])
    apply_densemixer(model)


def last_layer_unknown(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[1].mlp.gate.__class__ = type("MyRouter", (nn.Module,), {})
    apply_densemixer(model)


@pytest.mark.parametrize(
    "fail",
    [no_such_layer, log_that_fails, warning_that_is_an_error, last_layer_unknown],
    ids=lambda fail: fail.__name__,
)
def test_nothing_is_left_hooked(fail: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = FAMILIES["qwen3_moe"].build("eager")
    before = FAMILIES["qwen3_moe"].build("eager")
    with monkeypatch.context() as patch, pytest.raises(ValueError):  # noqa: PT011
        fail(model, patch)
    assert not attached_layers(model)
    hooks = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()]
    assert not any(hooks)
    gate, kind = model.model.layers[1].mlp.gate, before.model.layers[1].mlp.gate
    gate.__class__ = type(kind)
    gate.requires_grad_(True)
    assert traces(model) == traces(before)
    with apply_densemixer(model), apply_densemixer(before):
        assert torch.equal(loss_of(model), loss_of(before))
        ours, fresh = gradients(model), gradients(before)
    assert all(torch.equal(ours[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("family", KINDS)
def test_a_second_handle_leaves_the_first_alone(family: str) -> None:
    """Attaching twice is an error, for the whole model and for a part of it, and changes nothing."""
    model: Any = FAMILIES[family].build("eager")
    with apply_densemixer(model) as handle:
        expected, before = gradients(model), traces(model)
        for part in (model, model.model.layers[1], FAMILIES[family].blocks(model)[0]):
            with pytest.raises(RuntimeError, match=r"attached already.*\.remove\(\)"):
                apply_densemixer(part)
        model.zero_grad()
        assert attached_layers(model) == handle.layers
        assert traces(model).keys() == before.keys()
        found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["qwen3_moe"].build()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(UnsupportedModelError, match=r"transformers 5.5.4 and newer, and this is 4.57.6\. pip install"):
        apply_densemixer(model)


def test_a_router_in_a_module_of_another_kind(model: Any) -> None:
    """It has been put there since: the error names it, and what to do."""
    apply_densemixer(model)
    block = model.model.layers[1].mlp
    block.gate = nn.Sequential(block.gate)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.1\.mlp\.gate \(Sequential\).*'norm_topk_prob'.*first"
    ):
        loss_of(model)
