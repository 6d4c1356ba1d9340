"""What is refused, and that each error names the layer, the reason and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layers import CASES, build
from nemo_automodel.components.moe import experts as grouped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from densemixer_adapters import transformers
from densemixer_adapters.automodel import UnsupportedModelError, apply_densemixer

pytestmark = pytest.mark.skipif("sqrtsoftplus" not in CASES, reason="Automodel 0.4 has few of these")


def unbuilt(kind: type) -> Any:
    """A module of a class that can't be built without a GPU."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def mok(moe: Any) -> None:
    from nemo_automodel.components.moe.mok_experts import GroupedExpertsMoK

    moe.experts = unbuilt(GroupedExpertsMoK)


def transformer_engine(moe: Any) -> None:
    moe.experts = unbuilt(grouped.GroupedExpertsTE)


def lora(moe: Any) -> None:
    from nemo_automodel.components._peft.lora_experts import GroupedExpertsLoRA

    moe.experts = GroupedExpertsLoRA(moe.experts, lora_dim=2)


def mxfp8(moe: Any) -> None:
    moe.experts = build("softmax", "torch_mm_mxfp8").moe.experts


def own_gate(moe: Any) -> None:
    from nemo_automodel.components.models.kimi_k3.model import KimiK3Gate

    moe.gate = KimiK3Gate(moe.experts.config)


def another_gate(moe: Any) -> None:
    from nemo_automodel.components.models.gemma4_moe.model import Gemma4Gate

    moe.gate = unbuilt(Gemma4Gate)


def fake_gate(moe: Any) -> None:
    moe.gate = build("softmax", fake_balanced_gate=True).moe.gate


def biased_weights(moe: Any) -> None:
    moe.gate.router_weight_uses_score_correction_bias = True


def unknown_score(moe: Any) -> None:
    moe.gate.score_func = "cosine"


def unknown_activation(moe: Any) -> None:
    moe.experts.config.expert_activation = "sine"


@pytest.mark.parametrize(
    ("change", "reason", "fix"),
    [
        (mok, "the dispatcher mok computes routed and shared experts in one kernel", "choose another model.backend.di"),
        (transformer_engine, "GroupedExpertsTE, whose weights are elsewhere", "set model.backend.experts to torch_mm"),
        (lora, "LoRA on its experts", "leave the experts out of peft.target_modules"),
        (mxfp8, "torch_mm_mxfp8 has the experts compute with quantised", "set model.backend.experts to torch_mm"),
        (own_gate, "KimiK3Gate overrides how Automodel's Gate routes", "leave the layer out with the option `layers`"),
        (another_gate, "its gate is a Gemma4Gate", "leave the layer out with the option `layers`"),
        (fake_gate, "FakeBalancedGate learns nothing", "set model.backend.fake_balanced_gate to false"),
        (biased_weights, "router_weight_uses_score_correction_bias adds a bias to the weights", "set it to false"),
        (unknown_score, "its score_func cosine is unknown", "use one of softmax"),
        (unknown_activation, "its expert_activation sine is unknown", "use another one"),
    ],
)
def test_layers(change: Callable[[Any], None], reason: str, fix: str) -> None:
    model = nn.ModuleDict({"mlp": build("softmax").moe})
    change(model["mlp"])
    with pytest.raises(UnsupportedModelError) as caught:
        apply_densemixer(model)
    text = str(caught.value)
    assert text.startswith("mlp (MoE): DenseMixer can't train it: ")
    assert reason in text
    assert fix in text
    assert text.endswith("or switch DenseMixer off.")
    assert not model["mlp"]._forward_hooks


def test_pipeline_parallelism() -> None:
    from nemo_automodel.components.distributed.pipelining.autopipeline import AutoPipeline

    with pytest.raises(
        UnsupportedModelError, match=r"AutoPipeline: pipeline parallelism has not been run.*Set pp_size"
    ):
        apply_densemixer(AutoPipeline.__new__(AutoPipeline))  # type: ignore[arg-type]


def test_megatron_fsdp() -> None:
    from megatron_fsdp import MegatronFSDP

    model = unbuilt(MegatronFSDP)
    model.add_module("module", build("softmax").moe)
    with pytest.raises(UnsupportedModelError, match=r"Megatron-FSDP takes.*set distributed.strategy to fsdp2"):
        apply_densemixer(model)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process alone, of two that there aren't."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_tensor_parallelism() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    attention = nn.Linear(4, 4)
    attention.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()]))
    model = nn.ModuleDict({"attention": attention, "mlp": build("softmax").moe})
    with pytest.raises(UnsupportedModelError, match=r"tensor parallelism.*has not been run.*Either set tp_size to 1"):
        apply_densemixer(model)


def test_a_model_without_experts() -> None:
    with pytest.raises(UnsupportedModelError, match="has no Mixture-of-Experts layers"):
        apply_densemixer(nn.Linear(2, 2))


def test_the_function_for_models_of_transformers() -> None:
    model = nn.ModuleDict({"mlp": build("softmax").moe})
    with pytest.raises(UnsupportedModelError, match=r"^mlp \(MoE\): .*Take that of densemixer_adapters\.automodel"):
        transformers.apply_densemixer(model)


def test_options_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"must be a DenseMixerConfig, got dict.*from_dict"):
        apply_densemixer(build("softmax").moe, {"estimator": "centered"})  # type: ignore[arg-type]
