"""The host's forward is sacred: the same bits, and nothing added when it isn't training."""

import pytest
import torch
from families import FAMILIES, IMPLEMENTATIONS, tokens
from runs import Operations, gradients, loss_of

from densemixer_adapters.transformers import apply_densemixer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_bitwise_the_hosts(family: str, implementation: str, training: bool) -> None:
    model = FAMILIES[family].build(implementation).train(training)
    before = model(input_ids=tokens(), labels=tokens())
    with apply_densemixer(model):
        after = model(input_ids=tokens(), labels=tokens())
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_extra_operation_without_gradients(family: str, context: type, training: bool) -> None:
    model = FAMILIES[family].build().train(training)
    with context(), Operations() as before:
        loss_of(model)
    with apply_densemixer(model), context(), Operations() as after:
        loss_of(model)
    assert len(before.names) > 50
    assert after.names == before.names


def test_no_extra_operation_with_the_conventional_estimator() -> None:
    from densemixer_core import DenseMixerConfig

    model = FAMILIES["qwen3_moe"].build()
    with Operations() as before:
        loss_of(model).backward()
    model.zero_grad()
    with apply_densemixer(model, DenseMixerConfig(estimator="conventional")), Operations() as after:
        loss_of(model).backward()
    assert after.names == before.names


def test_grad_mode_decides_not_training_mode() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with apply_densemixer(model):
        training, evaluation = gradients(model.train()), gradients(model.eval())
    conventional = gradients(model)
    assert all(torch.equal(training[name], evaluation[name]) for name in training)
    assert not torch.equal(conventional["model.layers.1.mlp.gate.weight"], training["model.layers.1.mlp.gate.weight"])


def test_a_layer_that_trains_nothing_gets_no_extra_operation() -> None:
    """Gradients enabled, but no parameter in or before the layer needs one: a frozen trunk below a trained head."""
    model = FAMILIES["qwen3_moe"].build()
    model.model.requires_grad_(False)
    with Operations() as before:
        loss_of(model)
    with apply_densemixer(model), Operations() as after:
        loss_of(model)
    assert after.names == before.names
