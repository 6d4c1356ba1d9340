"""The flag in the configuration, the handle, and what is refused."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import typing
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import small_models
import torch
from cases import CASES, EXPERTS, Case, has
from layouts import HYBRID_EXPERTS
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from moe_layer import batch, build, config, run
from torch import nn

from densemixer_adapters import transformers
from densemixer_adapters.cli.doctor import examine
from densemixer_adapters.megatron import MegatronHandle, apply_densemixer, attached_handle, read_flag
from densemixer_adapters.megatron.config_field import patch_transformer_config
from densemixer_adapters.megatron.layer import MegatronLayer
from densemixer_adapters.megatron.positions import Selection, moe_layer_numbers
from densemixer_adapters.transformers import UnsupportedModelError
from densemixer_core import DenseMixerConfig, RoutingMismatchError

hybrid = pytest.mark.skipif(not has(HYBRID_EXPERTS), reason=f"hybrid models have experts since {HYBRID_EXPERTS}")
BIASED = CASES["TEGroupedMLP, biases"]
SMALL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "add_bias_linear": False}
CENTERED = {"estimator": "centered", "layers": [0, -1]}


@dataclasses.dataclass
class Derived(TransformerConfig):
    """As frameworks on top of Megatron Core have theirs."""

    vocabulary: int = 3


@pytest.mark.parametrize("kind", [TransformerConfig, MLATransformerConfig, Derived])
@pytest.mark.parametrize("value", [True, CENTERED])
def test_every_configuration_has_the_field(kind: Any, value: Any) -> None:
    made = kind(**SMALL, num_moe_experts=4, moe_densemixer=value)
    assert made.moe_densemixer == value
    assert kind(**SMALL).moe_densemixer is False
    assert "moe_densemixer" in {field.name for field in dataclasses.fields(kind)}
    for other in (dataclasses.replace(made, hidden_size=32), copy.deepcopy(made), copy.copy(made)):
        assert other.moe_densemixer == value
    assert dataclasses.asdict(made)["moe_densemixer"] == value
    assert typing.get_type_hints(kind)["moe_densemixer"] is Any
    assert hasattr(kind, "moe_densemixer")  # verl drops the keys that the class doesn't have


def test_positional_arguments_of_a_derived_class_stay_where_they_are() -> None:
    names = [f.name for f in dataclasses.fields(Derived) if not f.kw_only]
    assert names[-1] == "vocabulary"


def test_a_class_that_was_derived_before_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Base:
        size: int = 1

        def __post_init__(self) -> None: ...

    @dataclasses.dataclass
    class Before(Base):
        more: int = 2

    class Module:
        TransformerConfig = Base

    patch_transformer_config(Module)
    assert (Before(3, moe_densemixer=CENTERED).moe_densemixer, Before(3).moe_densemixer) == (CENTERED, False)
    assert (Before(3, 4).size, Before(3, 4).more) == (3, 4)


def test_the_values_of_the_flag() -> None:
    assert read_flag(config(Case())) is None
    assert read_flag(config(Case(), moe_densemixer=None)) is None
    assert read_flag(config(Case(), moe_densemixer=True)) == DenseMixerConfig()
    assert read_flag(config(Case(), moe_densemixer={"estimator": "centered"})) == DenseMixerConfig("centered")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "moe_densemixer must be true, false or a mapping of options, got 'yes'"),
        ({"estimater": "centered"}, "moe_densemixer: unknown option of DenseMixer: 'estimater'; did you mean"),
        ({"workspace_mb": "big"}, "moe_densemixer: workspace_mb must be an integer"),
        ({"layers": [1]}, "the model has 1 Mixture-of-Experts layers"),
    ],
)
def test_a_wrong_value_is_an_error_of_the_configuration(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(Case(), moe_densemixer=value)


def test_a_model_without_experts_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    TransformerConfig(**SMALL, moe_densemixer=True)
    assert "moe_densemixer has no effect: the model has no experts" in caplog.text


def test_the_command_line_that_megatron_lm_makes_of_the_fields() -> None:
    (field,) = (f for f in dataclasses.fields(TransformerConfig) if f.name == "moe_densemixer")
    parser = argparse.ArgumentParser()
    parser.add_argument("--moe-densemixer", default=field.default, **field.metadata["argparse_meta"])
    assert parser.parse_args([]).moe_densemixer is False
    assert parser.parse_args(["--moe-densemixer"]).moe_densemixer is True
    assert parser.parse_args(["--moe-densemixer", '{"layers": "-4:"}']).moe_densemixer == {"layers": "-4:"}
    parser.format_help()


def test_what_the_flag_attached_can_be_removed() -> None:
    layer = build(Case(), moe_densemixer=True)
    handle = attached_handle(layer)
    assert [type(each) for each in handle.layers] == [MegatronLayer]
    handle.remove()
    handle.remove()
    assert attached_handle(layer).layers == []
    x, g = batch(Case())
    ours, _ = run(layer, x, g)
    untouched = build(Case())
    host, _ = run(untouched, x, g)
    assert torch.equal(ours.router, host.router)
    for part in ("router", "token_dispatcher"):
        assert vars(getattr(layer, part)).keys() == vars(getattr(untouched, part)).keys()


def test_older_names_still_work() -> None:
    from densemixer_adapters.megatron import attached, enable

    layer = build(Case())
    with enable(layer) as handle:
        assert attached(layer).layers == handle.layers != []


def test_a_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs use the variable for something else."""
    layer = build(Case())
    monkeypatch.setenv("RANK", "worker-0")
    assert apply_densemixer(layer).layers


def test_attached_twice_is_an_error() -> None:
    layer = build(Case(), moe_densemixer=True)
    with pytest.raises(RuntimeError, match="attached already, by apply_densemixer or moe_densemixer"):
        apply_densemixer(layer)


def test_the_function_for_models_of_transformers() -> None:
    model = nn.ModuleDict({"mlp": build(Case())})
    with pytest.raises(UnsupportedModelError, match=r"^mlp \(MoELayer\): .*Take that of densemixer_adapters\.megatron"):
        transformers.apply_densemixer(model)


def test_a_later_patch_of_megatrons_own_method_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As verl patches the class of routers to replay a selection."""
    layer = build(Case())
    apply_densemixer(layer)
    called = []
    original = type(layer.router).routing
    monkeypatch.setattr(
        type(layer.router), "routing", lambda self, *a, **k: called.append(1) or original(self, *a, **k)
    )
    run(layer, *batch(Case()))
    assert called == [1]


def test_nothing_is_added_without_gradients() -> None:
    layer = build(Case(), moe_densemixer=True)
    x, _ = batch(Case())
    with torch.no_grad():
        output, _ = layer(x)
    assert output.grad_fn is None
    assert attached_handle(layer).layers[0]._running is None


def test_conventional_is_megatrons_own() -> None:
    x, g = batch(Case())
    ours, _ = run(build(Case(), moe_densemixer={"estimator": "conventional"}), x, g)
    host, _ = run(build(Case()), x, g)
    assert torch.equal(ours.router, host.router)


@pytest.mark.parametrize("input_trains", [True, False])
@pytest.mark.parametrize("by_flag", [True, False])
def test_a_frozen_router_is_warned_of_once(by_flag: bool, input_trains: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In each model of the process, also where nothing below the router trains."""
    for _ in range(2):
        layer = build(Case(), moe_densemixer=by_flag)
        layer.router.requires_grad_(False)
        if not by_flag:
            apply_densemixer(layer)
        x, g = batch(Case())
        for _ in range(2):
            layer(x.clone().requires_grad_(input_trains))[0].backward(g)
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "nothing to train where the router is frozen" in warnings[0].getMessage()
        assert layer.router.weight.grad is None
        caplog.clear()


def test_a_router_that_routes_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(Case(), moe_densemixer=True)
    original = type(layer.router).routing

    def routing(self: Any, logits: torch.Tensor) -> Any:
        probs, routing_map = original(self, logits)
        return probs**2, routing_map

    monkeypatch.setattr(type(layer.router), "routing", routing)
    monkeypatch.setattr(type(layer.router), "forward", lambda self, x, *args: self.routing(self.gating(x)))
    with pytest.raises(RoutingMismatchError, match="routes differently"):
        run(layer, *batch(Case()))


REFUSED = {
    "moe_expert_capacity_factor drops tokens": {
        "moe_expert_capacity_factor": 1.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
    },
    "moe_apply_probs_on_input scales": {
        "moe_apply_probs_on_input": True,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    },
    "sinkhorn selects": {"moe_router_load_balancing_type": "sinkhorn"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_when_the_configuration_is_made(reason: str) -> None:
    case = Case(REFUSED[reason])
    with pytest.raises(
        UnsupportedModelError, match=f"moe_densemixer: .*this model: .*{reason}.*Either .*, or switch DenseMixer off"
    ):
        config(case, moe_densemixer=True)
    layer = build(case)  # without the flag Megatron builds it
    with pytest.raises(UnsupportedModelError, match=reason):
        apply_densemixer(layer)
    assert attached_handle(layer).layers == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("overlap_moe_expert_parallel_comm", True),
        ("fp8", "e4m3"),
        ("fp4", "e2m1"),
        ("enable_cuda_graph", True),
        ("external_cuda_graph", True),
        ("cuda_graph_impl", "local"),
        ("moe_mlp_glu_interleave_size", 32),
        ("moe_expert_rank_capacity_factor", 1.5),
        ("moe_single_grouped_weight", True),
        ("moe_single_grouped_bias", True),
        ("moe_ncclep_zero_copy", True),
        ("quant_recipe", object()),
        ("use_kitchen", True),
    ],
)
def test_options_that_need_a_gpu_are_refused(option: str, value: Any) -> None:
    """Megatron can't build such a layer here, so the option is set once it is built."""
    layer = build(Case())
    setattr(layer.config, option, value)
    with pytest.raises(
        UnsupportedModelError, match=rf"can't train this model: {option} .*Either .*, or switch DenseMixer off"
    ):
        apply_densemixer(layer)


def test_weights_that_are_split_further_are_refused() -> None:
    layer = build(Case())
    layer.config.expert_gtp_weight_remat_size = 2
    with pytest.raises(UnsupportedModelError, match=r"expert_tensor_parallel_num_weight_shards leaves a part .* unset"):
        apply_densemixer(layer)


@pytest.mark.skipif(not BIASED.exists, reason=f"since Megatron Core {BIASED.since}")
def test_biases_that_are_somewhere_else_are_refused() -> None:
    """As Transformer Engine has them with moe_single_grouped_bias: all in one parameter, and None for each expert."""
    layer = build(BIASED)
    for position in range(EXPERTS):
        setattr(layer.experts.linear_fc2, f"bias{position}", None)
    with pytest.raises(UnsupportedModelError, match="TEGroupedMLP: no biases, although add_bias_linear is on"):
        apply_densemixer(layer)


def test_biases_under_expert_tensor_parallelism_are_refused() -> None:
    layer = build(Case())
    layer.config.add_bias_linear, layer.config.expert_tensor_parallel_size = True, 2
    with pytest.raises(UnsupportedModelError, match="add_bias_linear with expert tensor parallelism"):
        apply_densemixer(layer)


def wrap_an_expert(layer: Any) -> None:
    """As an adapter does."""
    expert = layer.experts.local_experts[1]
    expert.linear_fc1 = nn.Sequential(expert.linear_fc1)


UNREADABLE = r"Mixture-of-Experts layer{}: DenseMixer can't read the weights of its experts \(SequentialMLP"


def test_experts_that_cannot_be_read_are_refused() -> None:
    layer = build(Case())
    wrap_an_expert(layer)
    with pytest.raises(UnsupportedModelError, match=UNREADABLE.format(" 1")):
        apply_densemixer(layer)


def test_the_flag_refuses_them_when_the_layer_has_its_number() -> None:
    """Its number in the whole model, which Megatron gives it once it is built."""
    layer = build(Case(), moe_densemixer=True)
    wrap_an_expert(layer)
    with pytest.raises(UnsupportedModelError, match="moe_densemixer: " + UNREADABLE.format(" 7")):
        layer.set_layer_number(7)


def test_the_flag_refuses_them_in_a_layer_that_never_gets_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoELayer, "set_layer_number", lambda self, number: None)
    layer = build(Case(), moe_densemixer=True)
    wrap_an_expert(layer)
    with pytest.raises(UnsupportedModelError, match=UNREADABLE.format("")):
        run(layer, *batch(Case()))


def test_layers_are_named_by_their_numbers_in_the_whole_model() -> None:
    stage = nn.ModuleDict({"mlp": build(Case())})
    stage["mlp"].set_layer_number(7)
    with apply_densemixer(stage) as handle:
        assert [layer.name for layer in handle.layers] == ["Mixture-of-Experts layer 7 (mlp on this rank)"]
        with pytest.raises(RuntimeError, match=r"layer 7 .*attached already"):
            apply_densemixer(stage)


def test_a_router_of_another_kind_is_refused() -> None:
    layer = build(Case())
    layer.router = nn.Linear(16, EXPERTS)
    with pytest.raises(UnsupportedModelError, match="its router is a Linear, not Megatron's TopKRouter"):
        apply_densemixer(layer)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no MoELayer"):
        apply_densemixer(nn.Linear(2, 2))


def test_a_pipeline_stage_without_experts_is_none() -> None:
    """Where the first layers are dense, a stage may have none of the model's experts."""
    stage = nn.Linear(2, 2)
    stage.config = config(Case())
    handle = apply_densemixer([stage])
    assert isinstance(handle, MegatronHandle)
    assert handle.layers == []


def test_a_pipeline_stage_without_experts_raises_what_the_others_raise() -> None:
    stage = nn.Linear(2, 2)
    stage.config = config(Case(), num_layers=4, moe_layer_freq=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="the model has 2 Mixture-of-Experts layers"):
        apply_densemixer([stage], DenseMixerConfig(layers=[2]))
    stage.config.fp8 = "e4m3"
    with pytest.raises(UnsupportedModelError, match="this model: fp8"):
        apply_densemixer([stage])


@pytest.mark.parametrize(
    ("options", "pattern"), [({"mtp_num_layers": 1}, None), ({}, "*E/*E"), ({"mtp_num_layers": 1}, "*E/*E")]
)
def test_layers_of_a_model_with_multi_token_prediction(options: dict[str, Any], pattern: str | None) -> None:
    settings = config(Case(), num_layers=2, **options)
    with pytest.raises(ValueError, match=r"multi-token prediction are not known\. Leave `layers` out"):
        Selection(settings, DenseMixerConfig(layers=[0]), pattern)
    Selection(settings, DenseMixerConfig(), pattern)


def test_the_pattern_of_a_hybrid_model_says_which_layers_have_experts() -> None:
    settings = config(Case(), num_layers=6)
    assert moe_layer_numbers(settings, "ME*|EM-") == [2, 4]
    assert moe_layer_numbers(settings, "") == []
    assert moe_layer_numbers(settings) == [1, 2, 3, 4, 5, 6]


@hybrid
@pytest.mark.parametrize("layers", [[2], [-3], "3:"])
def test_positions_that_a_hybrid_model_does_not_have(layers: Any) -> None:
    """It has two such layers among its five, and knows it before any is built."""
    with pytest.raises(ValueError, match="the model has 2 Mixture-of-Experts layers"):
        small_models.build(pattern="*E*E*", moe_densemixer={"layers": layers})
    with pytest.raises(ValueError, match="the model has 2 Mixture-of-Experts layers"):
        apply_densemixer(small_models.build(pattern="*E*E*"), DenseMixerConfig(layers=layers))


@hybrid
@pytest.mark.parametrize("by_flag", [True, False])
def test_layers_in_a_hybrid_model(by_flag: bool) -> None:
    options = DenseMixerConfig(layers=[-1])
    model = small_models.build(
        pattern="*E*E*", is_hybrid_model=True, moe_densemixer={"layers": [-1]} if by_flag else False
    )
    handle = attached_handle(model) if by_flag else apply_densemixer(model, options)
    assert [layer.block.layer_number for layer in handle.layers if layer.is_selected()] == [4]


@hybrid
def test_layers_in_a_part_of_a_hybrid_model() -> None:
    """Its pattern isn't known there, and moe_layer_freq, which is 1, would mean others."""
    part = small_models.build(pattern="*E*E*").decoder.layers
    with pytest.raises(ValueError, match=r"experts in layers \[1, 2, 3, 4, 5\], but of this rank's, layers \[2, 4\]"):
        apply_densemixer(part, DenseMixerConfig(layers=[0]))
    assert len(apply_densemixer(part).layers) == 2
    with pytest.raises(ValueError, match="call `apply_densemixer` on the whole model"):
        Selection(config(Case(), is_hybrid_model=True), DenseMixerConfig(layers=[0]))


def test_layers_of_an_encoder_do_not_count() -> None:
    """Its layers have numbers of their own, also where this rank has none of the first layers with experts."""
    encoder, layer = nn.Linear(2, 2), build(Case(), num_layers=2)
    encoder.config, encoder.layer_number = TransformerConfig(**SMALL), 1
    layer.set_layer_number(2)
    with apply_densemixer(nn.ModuleList([encoder, layer]), DenseMixerConfig(layers=[-1])) as handle:
        assert len(handle.layers) == 1


def test_a_layer_with_experts_that_the_configuration_does_not_know_of() -> None:
    layer = build(Case(), num_layers=2, moe_layer_freq=[0, 1], moe_densemixer={"layers": [0]})  # its number is 1
    with pytest.raises(ValueError, match=r"experts in layers \[2\], but layer 1 has experts.*Set moe_layer_freq"):
        run(layer, *batch(Case()))


def test_positions_count_all_pipeline_stages() -> None:
    """Layers 1 and 3 of 4 are dense; this stage holds layer 4 alone."""
    layer = build(Case(), num_layers=4, moe_layer_freq=[0, 1, 0, 1])
    for number, positions, chosen in ((2, [0], 1), (4, [0], 0), (4, [-1], 1), (4, "1:", 1)):
        layer.set_layer_number(number)
        with apply_densemixer(layer, DenseMixerConfig(layers=positions)) as handle:
            assert len(handle.layers) == chosen


def test_megatron_layers_are_found_in_all_chunks() -> None:
    chunks = [nn.ModuleDict({"mlp": build(Case())}), nn.ModuleDict({"mlp": build(Case())})]
    assert [layer.block for layer in apply_densemixer(chunks).layers] == [chunk["mlp"] for chunk in chunks]
    assert all(isinstance(layer.block, MoELayer) for layer in attached_handle(chunks).layers)


def test_the_doctor_looks_for_the_modules_that_are_hooked() -> None:
    """Those that this version of Megatron Core has; a missing one that all versions have would be a problem."""
    found = {check.name: check.state for check in examine() if check.name.startswith("hook megatron.")}
    modules = ("transformer.moe.moe_layer", "transformer.transformer_config", "models.mamba.mamba_model")
    assert {f"hook megatron.core.{module}" for module in modules} <= set(found)
    assert set(found.values()) == {"ok"}
