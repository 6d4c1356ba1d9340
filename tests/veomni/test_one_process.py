"""VeOmni's models on one process: gradients of the dense oracle, outputs as without, and what is refused."""

from __future__ import annotations

import pytest
import small_models
import torch
from small_models import FAMILIES, apart, build, gradients_of, ids_of, loss_of, truth_of_part, worst

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_adapters.transformers.checks import OutputMismatchError
from densemixer_adapters.transformers.experts import WITHOUT_DECORATOR
from densemixer_core import DenseMixerConfig

TOLERANCE = 1e-5


@pytest.mark.parametrize("estimator", ["densemixer", "centered", "conventional"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_oracle(family: str, estimator: str) -> None:
    model = build(family)
    apply_densemixer(model, DenseMixerConfig(estimator))
    loss_of(model, ids_of(0)).backward()
    found = gradients_of(model)
    assert worst(found, truth_of_part(family, estimator, 0)) < TOLERANCE
    assert (apart(found, truth_of_part(family, "conventional", 0)) > 0.1) == (estimator != "conventional")


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_stay_bit_for_bit_and_all_is_undone(family: str) -> None:
    model = build(family)
    without = loss_of(model, ids_of(0))
    without.backward()
    before = gradients_of(model)
    model.zero_grad()
    with apply_densemixer(model):
        assert loss_of(model, ids_of(0)).equal(without)
    loss_of(model, ids_of(0)).backward()
    assert all(gradient.equal(before[name]) for name, gradient in gradients_of(model).items())


def test_a_wrong_declaration_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is declared of experts without transformers' decorator is compared with what they return."""
    monkeypatch.setitem(WITHOUT_DECORATOR, "GptOssExperts", {"is_transposed": True})  # they have biases
    model = build("gpt_oss")
    apply_densemixer(model)
    with pytest.raises(OutputMismatchError, match="their output isn't the sum of w_j"):
        loss_of(model, ids_of(0))


@pytest.mark.parametrize("first", ["adapters", "DenseMixer"])
def test_adapters_in_the_place_of_experts_are_refused(first: str) -> None:
    """VeOmni's LoRA on experts moves their weights into modules of its own."""
    from veomni.lora.moe_layers import LoraIndependentExperts

    model = build("qwen3_moe")
    block = model.model.layers[0].mlp

    def adapt() -> None:
        block.experts = LoraIndependentExperts(block.experts, r=2, lora_alpha=4)

    if first == "adapters":
        adapt()
        with pytest.raises(
            UnsupportedModelError, match=r"experts \(LoraIndependentExperts\) don't hold stacked weights"
        ):
            apply_densemixer(model)
    else:
        apply_densemixer(model)
        adapt()
        with pytest.raises(UnsupportedModelError, match="LoraIndependentExperts, which holds no stacked weights"):
            loss_of(model, ids_of(0))


class Shifted:
    """A controller of router replay that has every token go to the experts after those that it chose."""

    def __init__(self) -> None:
        self.replayed: list[torch.Tensor] = []

    def on_router_forward(self, router: object, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.replayed.append((index + 1) % scores.shape[-1])
        return self.replayed[-1]


def test_replayed_indices_count() -> None:
    from veomni.utils.moe_router_replay import set_active_replay

    family = FAMILIES["qwen3_moe"]
    model, exact = build("qwen3_moe"), build("qwen3_moe")
    apply_densemixer(model)
    found = {}
    for one, name in ((model, "found"), (small_models.make_dense(exact, family, "densemixer"), "exact")):
        set_active_replay(Shifted())
        try:
            with small_models.oracle.Float64() if one is exact else torch.enable_grad():
                loss_of(one, ids_of(0)).backward()
        finally:
            set_active_replay(None)
        found[name] = gradients_of(one)
    assert worst(found["found"], found["exact"]) < TOLERANCE
    assert apart(found["found"], truth_of_part("qwen3_moe", "densemixer", 0)) > 0.1
