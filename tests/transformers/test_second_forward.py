"""Adapters on the experts, and further forwards of the model before the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import ESTIMATORS, KINDS, collected
from families import FAMILIES, Family, tokens
from lora import lora_config, one_adapter_only, router_gradients, truth_of, wrapped
from oracle import Float64, assert_close
from peft import PeftModel
from runs import loss_of, selections
from torch import Tensor

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

BATCHES = [tokens(seed=1), tokens(seed=2, length=7), tokens(seed=3)]


def adapted(family: str, router: str = "modules_to_save", implementation: str = "grouped_mm") -> PeftModel:
    """Adapters on the experts, and a router that trains: built the same each time."""
    of = FAMILIES[family]
    return wrapped(of, of.build(implementation), "experts", router)


def with_reference(family: str) -> PeftModel:
    """As TRL has it for DPO and KTO: the adapter that trains, and a frozen one for the reference."""
    model = adapted(family)
    torch.manual_seed(1)
    model.add_adapter("ref", lora_config(FAMILIES[family], "experts", "modules_to_save"))
    model.set_adapter("default")
    return model


def truth(family: Family, plain: PeftModel, batches: list[Tensor], estimator: str) -> dict[str, Tensor]:
    """The sum of the gradients of ``batches`` for a model that nothing is attached to, each forward by itself."""
    total: dict[str, Tensor] = {}
    for ids in batches:
        with selections(family, plain) as indices, torch.no_grad():
            loss_of(plain, ids)
        dense = truth_of(family, plain, indices, estimator)
        with Float64():
            loss_of(dense, ids).backward()
        total = {name: gradient + total.get(name, 0) for name, gradient in collected(dense).items()}
    assert router_gradients(family, total)
    assert any(".experts." in name for name in total)
    return total


def evaluation(model: Any) -> None:
    with torch.no_grad():
        loss_of(model, BATCHES[1])


def generation(model: Any) -> None:
    model.generate(input_ids=BATCHES[1], max_new_tokens=3, do_sample=False, use_cache=False)


def without_adapters(model: Any) -> None:
    with model.disable_adapter(), torch.no_grad():
        loss_of(model, BATCHES[1])


def training_forward(model: Any) -> None:
    """One whose graph is dropped."""
    loss_of(model, BATCHES[1])


def experts_alone(model: Any) -> None:
    """The experts alone, as somebody who measures them would call them."""
    with torch.no_grad():
        for module in list(model.modules()):
            if hasattr(module, "experts"):
                x = torch.ones(3, 64)
                module.experts(x, torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))


BETWEEN: dict[str, Callable[[Any], None]] = {
    function.__name__: function
    for function in (evaluation, generation, without_adapters, training_forward, experts_alone)
}


@pytest.mark.parametrize(
    ("router", "estimator"), [("modules_to_save", "densemixer"), ("target_parameters", "centered")]
)
@pytest.mark.parametrize("between", BETWEEN)
def test_before_the_backward(between: str, estimator: str, router: str) -> None:
    expected = truth(FAMILIES["qwen3_moe"], adapted("qwen3_moe", router), BATCHES[:1], estimator)
    model = adapted("qwen3_moe", router)
    with apply_densemixer(model, DenseMixerConfig(estimator)):
        loss = loss_of(model, BATCHES[0])
        BETWEEN[between](model)
        loss.backward()
    assert_close(collected(model), expected)


@pytest.mark.parametrize("when", ["before PEFT", "after PEFT"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", KINDS)
def test_two_training_forwards_and_then_their_backwards(family: str, estimator: str, when: str) -> None:
    of = FAMILIES[family]
    expected = truth(of, adapted(family), BATCHES[:2], estimator)
    if when == "before PEFT":
        plain = of.build()
        handle = apply_densemixer(plain, DenseMixerConfig(estimator))
        model = wrapped(of, plain, "experts", "modules_to_save")
    else:
        model = adapted(family)
        handle = apply_densemixer(model, DenseMixerConfig(estimator))
    with handle:
        first, second = loss_of(model, BATCHES[0]), loss_of(model, BATCHES[1])
        first.backward()
        second.backward()
    assert_close(collected(model), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_one_backward_of_many_forwards(implementation: str) -> None:
    of = FAMILIES["qwen3_moe"]
    expected = truth(of, adapted("qwen3_moe"), BATCHES, "densemixer")
    model = adapted("qwen3_moe", implementation=implementation)
    with apply_densemixer(model):
        losses = [loss_of(model, ids) for ids in BATCHES]
        evaluation(model)
        torch.stack(losses).sum().backward()
    assert_close(collected(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_under_checkpointing(family: str, reentrant: bool) -> None:
    expected = truth(FAMILIES[family], adapted(family), BATCHES[:2], "densemixer")
    model = adapted(family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with apply_densemixer(model):
        first, second = loss_of(model, BATCHES[0]), loss_of(model, BATCHES[1])
        evaluation(model)
        second.backward()
        first.backward()
    assert_close(collected(model), expected)


@pytest.mark.parametrize("order", ["reference last", "reference first"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", KINDS)
def test_a_reference_adapter(family: str, estimator: str, order: str) -> None:
    """The loss compares both adapters' logits, as in DPO and KTO."""
    if one_adapter_only():
        pytest.skip("this version of PEFT has one adapter with `target_parameters` at most")
    of, ids = FAMILIES[family], BATCHES[0]

    def loss(model: Any, reference: Tensor) -> Tensor:
        return (model(input_ids=ids).logits - reference).pow(2).mean()

    def of_reference(model: Any) -> Tensor:
        model.set_adapter("ref")
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        model.set_adapter("default")
        return logits

    plain = with_reference(family)
    with torch.no_grad():
        reference = of_reference(plain)
        with selections(of, plain) as indices:
            plain(input_ids=ids)
    dense = truth_of(of, plain, indices, estimator)
    with Float64():
        loss(dense, reference.double()).backward()

    model = with_reference(family)
    with apply_densemixer(model, DenseMixerConfig(estimator)):
        if order == "reference first":
            seen = of_reference(model)
            value = loss(model, seen)
        else:
            policy = model(input_ids=ids).logits
            seen = of_reference(model)
            value = (policy - seen).pow(2).mean()
        value.backward()
    assert torch.equal(seen, reference)
    ours = collected(model)
    assert_close(ours, collected(dense))
    assert not any(".ref" in name for name in ours)


def test_adapters_that_train_in_turns() -> None:
    """Each forward's backward uses the adapter that was active in the forward."""
    if one_adapter_only():
        pytest.skip("this version of PEFT has one adapter with `target_parameters` at most")
    of = FAMILIES["qwen3_moe"]
    expected: dict[str, Tensor] = {}
    for active, ids in zip(["default", "ref"], BATCHES, strict=False):
        plain = with_reference("qwen3_moe")
        plain.set_adapter(active)
        expected |= truth(of, plain, [ids], "centered")
    model = with_reference("qwen3_moe")
    with apply_densemixer(model, DenseMixerConfig("centered")):
        losses = []
        for active, ids in zip(["default", "ref"], BATCHES, strict=False):
            model.set_adapter(active)
            losses.append(loss_of(model, ids))
        for loss, active in reversed(list(zip(losses, ["default", "ref"], strict=True))):
            model.set_adapter(active)  # else PEFT has frozen what this loss is to train
            loss.backward()
    assert_close(collected(model), expected)


def test_adapters_merged_for_an_evaluation() -> None:
    """Between steps. The merged weights aren't to the last bit what they were."""
    of = FAMILIES["qwen3_moe"]
    expected = truth(of, adapted("qwen3_moe"), BATCHES[:2], "densemixer")
    model = adapted("qwen3_moe")
    with apply_densemixer(model):
        for ids in BATCHES[:2]:
            loss_of(model, ids).backward()
            model.merge_adapter()
            evaluation(model)
            model.unmerge_adapter()
    assert_close(collected(model), expected, 1e-4)
