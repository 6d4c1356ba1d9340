"""Gradient checkpointing: the same gradients, and the extra pass runs once a layer and step."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from runs import gradients
from torch import nn

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import sampled

KINDS = {"reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def checkpointed(model: nn.Module, kind: str) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_gradients(family: str, kind: str) -> None:
    model = FAMILIES[family].build("eager")
    with apply_densemixer(model):
        plain = gradients(model)
        again = gradients(checkpointed(model, kind))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_the_extra_pass_runs_once_a_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    evaluate = sampled.expert_dots
    monkeypatch.setattr(sampled, "expert_dots", lambda *args: passes.append(1) or evaluate(*args))
    model = FAMILIES["qwen3_moe"].build()
    if kind != "none":
        checkpointed(model, kind)
    with apply_densemixer(model) as handle:
        gradients(model)
    assert len(passes) == len(handle.layers) == 2
