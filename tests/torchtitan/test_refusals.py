"""What can't be trained this way stops with an error that names the layer, the reason and the fix."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("torchtitan", reason="needs torchtitan; run `nox -s torchtitan`")

import titan_layer
import torch
from titan_layer import CASES, build, config_of
from torch import nn
from torchtitan.components.quantization.float8 import _get_float8_grouped_experts_cls
from torchtitan.components.quantization.mx import _get_mxfp8_grouped_experts_cls
from torchtitan.models.common.moe import GroupedExperts, MoE, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import (
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
    TorchAOTokenDispatcher,
)
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.overrides.fused_swiglu import FusedGroupedExperts

from densemixer_adapters import transformers
from densemixer_adapters.torchtitan import UnsupportedModelError, apply_densemixer
from densemixer_adapters.transformers.checks import OutputMismatchError
from densemixer_core import DenseMixerConfig, RoutingMismatchError

CASE = next(iter(CASES.values()))


class Model(nn.Module):
    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"moe": moe})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block["moe"](x)
        return y


def of_class(module: Any, kind: type) -> Any:
    """An instance that has what ``module`` has. Building one anew would need a GPU, or libraries for GPUs."""
    other = object.__new__(kind)
    vars(other).update(vars(module))
    return other


def with_experts(kind: type) -> Any:
    moe = build(CASE)
    moe.routed_experts.inner_experts = of_class(moe.routed_experts.inner_experts, kind)
    return moe


def with_dispatcher(kind: type, **values: Any) -> Any:
    moe = build(CASE)
    moe.routed_experts.token_dispatcher = of_class(moe.routed_experts.token_dispatcher, kind)
    vars(moe.routed_experts.token_dispatcher).update(values)
    return moe


def balanced() -> Any:
    config = config_of(CASE)
    config.router._debug_force_load_balance = True
    return config.build()


def with_router() -> Any:
    class OtherRouter(TokenChoiceTopKRouter):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(TokenChoiceTopKRouter.Config):
            pass

    moe = build(CASE)
    moe.router = of_class(moe.router, OtherRouter)
    return moe


def of_another_class() -> Any:
    class OtherMoE(MoE):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(MoE.Config):
            pass

    return of_class(build(CASE), OtherMoE)


REFUSED = {
    "FP8": (lambda: with_experts(_get_float8_grouped_experts_cls(GroupedExperts)), "Float8GroupedExperts.*quantised"),
    "MXFP8": (lambda: with_experts(_get_mxfp8_grouped_experts_cls(GroupedExperts)), "MXFP8GroupedExperts.*quantised"),
    "FP8, gpt-oss": (
        lambda: with_experts(_get_float8_grouped_experts_cls(GptOssGroupedExperts)),
        "Float8GptOssGroupedExperts.*quantised",
    ),
    "MXFP8, gpt-oss": (
        lambda: with_experts(_get_mxfp8_grouped_experts_cls(GptOssGroupedExperts)),
        "MXFP8GptOssGroupedExperts.*quantised",
    ),
    "fused experts": (lambda: with_experts(FusedGroupedExperts), "FusedGroupedExperts.*another layout"),
    "padded tokens": (lambda: with_dispatcher(TorchAOTokenDispatcher), "TorchAOTokenDispatcher.*quantised"),
    "DeepEP": (lambda: with_dispatcher(DeepEPTokenDispatcher), "DeepEP.*not been run.*comm_backend"),
    "HybridEP": (lambda: with_dispatcher(HybridEPTokenDispatcher), "HybridEP.*not been run.*comm_backend"),
    "MinimalAsyncEP": (lambda: with_dispatcher(MinimalAsyncEPTokenDispatcher), "MinimalAsync.*not been run"),
    "capacity": (
        lambda: with_dispatcher(HybridEPTokenDispatcher, non_blocking_capacity_factor=0.5),
        "non_blocking_capacity_factor is 0.5.*dropped.*leave it None",
    ),
    "forced balance": (balanced, "moe_force_load_balance.*switch it off"),
    "another router": (with_router, "router is a OtherRouter.*build it with TokenChoiceTopKRouter"),
    "another layer": (of_another_class, "layer is a OtherMoE.*build it with MoE or GptOssMoE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer(name: str) -> None:
    make, message = REFUSED[name]
    model = Model(make())
    with pytest.raises(UnsupportedModelError, match=rf"^block\.moe: DenseMixer can't train it: .*{message}"):
        apply_densemixer(model)
    assert not model.block["moe"].router._forward_hooks


def test_a_model_without_experts() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no layer of torchtitan's class MoE"):
        apply_densemixer(nn.Linear(2, 2))


def test_the_function_for_models_of_transformers() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^block\.moe \(MoE\): .*Take that of .*\.torchtitan"):
        transformers.apply_densemixer(Model(build(CASE)))


def test_twice() -> None:
    model = Model(build(CASE))
    apply_densemixer(model)
    with pytest.raises(RuntimeError, match=r"block\.moe: DenseMixer is attached already"):
        apply_densemixer(model)


def test_metrics() -> None:
    with pytest.raises(ValueError, match=r"metrics: .*Leave the option out"):
        apply_densemixer(Model(build(CASE)), DenseMixerConfig(metrics=True))


def test_layers_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"layers=\(3,\): the model has 1"):
        apply_densemixer(Model(build(CASE)), DenseMixerConfig(layers=[3]))


def test_compiled_before() -> None:
    model = Model(build(CASE))
    model.block.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"^block: .*compiled.*compile\.components"):
        apply_densemixer(model)


def test_compiled_afterwards() -> None:
    """As torchtitan compiles: the error is torch.compile's, with the text of ours."""
    model = Model(build(CASE, torch.float32))
    apply_densemixer(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"leave \\?\"model\\?\" out of compile\.components"):
        compiled(titan_layer.batch(torch.float32)[0])


def test_a_router_that_routes_differently() -> None:
    """As a patch of torchtitan may make it: the first training forward finds out."""
    moe = build(CASE, torch.float32)
    forward = moe.router.forward

    def patched(*args: Any) -> Any:
        weights, index, scores = forward(*args)
        return weights.square(), index, scores

    moe.router.forward = patched
    with apply_densemixer(Model(moe)), pytest.raises(RoutingMismatchError, match=r"^block\.moe: .*routes differently"):
        moe(titan_layer.batch(torch.float32)[0])


def test_experts_that_return_something_else() -> None:
    """As a patch of them may make it: the gradient would be that of other experts."""
    moe = build(CASE, torch.float32)
    experts = moe.routed_experts.inner_experts
    forward = experts.forward
    experts.forward = lambda *args: 3 * forward(*args)
    with (
        apply_densemixer(Model(moe)),
        pytest.raises(OutputMismatchError, match=r"^block\.moe\.routed_experts: .*it is 3(\.0\d*)? times that"),
    ):
        moe(titan_layer.batch(torch.float32)[0])


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        (0, "1 ranks with 4 experts each, out of 8"),
        (1, r"\d+ rows of a down projection, out of \d+: .*not the experts"),
    ],
)
def test_weights_that_are_sharded_in_the_backward(dim: int, message: str) -> None:
    moe = build(CASE, torch.float32)
    x, g = titan_layer.batch(torch.float32)
    with apply_densemixer(Model(moe)):
        y = moe(x)
        inner = moe.routed_experts.inner_experts
        for name, weight in list(inner.named_parameters()):
            setattr(inner, name, nn.Parameter(weight.detach().chunk(2, dim)[0]))
        with pytest.raises(RuntimeError, match=rf"block\.moe: .*{message}"):
            y.backward(g)


def test_options_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"must be a DenseMixerConfig, got dict.*from_dict"):
        apply_densemixer(Model(build(CASE)), {"estimator": "centered"})  # type: ignore[arg-type]


def test_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are those of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    moe = build(CASE, torch.float32)
    with (
        apply_densemixer(Model(moe)),
        pytest.raises(UnsupportedModelError, match=r"^block\.moe: .*CUDA graph.*disable_cuda_graphs"),
    ):
        moe(titan_layer.batch(torch.float32)[0])
