"""A small GPTModel, built from a configuration with the flag, with Megatron's own DDP and optimizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import torch
from small_models import DEAD, build
from training import forward_backward, train, wrap

from densemixer_adapters.megatron import apply_densemixer, attached_handle

MEASURED = {"metrics": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}

WITHOUT_US = """
import cpu, json, sys, torch.distributed as dist
from megatron.core import parallel_state
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
import small_models, training
print(json.dumps(training.train(small_models.build())))
assert "densemixer_core" not in sys.modules
"""


@pytest.fixture(scope="module")
def on() -> dict[str, Any]:
    return train(build(moe_densemixer=True))


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return train(build(moe_densemixer=MEASURED))


@pytest.fixture(scope="module")
def off() -> dict[str, Any]:
    return train(build())


def norms(run: dict[str, Any]) -> torch.Tensor:
    """Of the routers' gradients, [layers, experts]."""
    return torch.tensor(list(run["gradients"].values())).norm(dim=-1)


def test_the_loss_falls(on: dict[str, Any]) -> None:
    assert on["losses"][-1] < 0.7 * on["losses"][0]


def test_experts_that_are_never_selected_teach_the_router(on: dict[str, Any], off: dict[str, Any]) -> None:
    with_flag, without = (norms(run) for run in (on, off))
    assert (without[:, DEAD:] == 0).all()
    assert (with_flag[:, DEAD:] > 1e-3).all()
    assert on["losses"][0] == off["losses"][0]


def test_without_the_flag_nothing_changes(off: dict[str, Any]) -> None:
    """The bits of losses, gradients and weights are those of a process that knows nothing of DenseMixer."""
    environment = {**os.environ, "DENSEMIXER_BOOT": "0", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", WITHOUT_US]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == off


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputation_changes_nothing(measured: dict[str, Any], recompute: dict[str, Any]) -> None:
    """What is measured of the routers is the same too."""
    assert train(build(moe_densemixer=MEASURED, **recompute)) == measured


def test_what_is_measured_changes_nothing(on: dict[str, Any], measured: dict[str, Any]) -> None:
    assert measured["digest"] == on["digest"]
    assert not any(on["metrics"])
    assert all(len(row) == 3 * 5 for row in measured["metrics"])  # of two layers, and of both


def test_the_scale_of_the_loss_is_taken_out(measured: dict[str, Any]) -> None:
    """As the optimizer does it in half precision, after the gradients were made."""
    scaled = train(build(moe_densemixer=MEASURED), steps=1, loss_scale=1024.0)["metrics"][0]
    assert scaled == pytest.approx(measured["metrics"][0], rel=1e-5)


def test_enable_does_what_the_flag_does(on: dict[str, Any]) -> None:
    model = build()
    handle = apply_densemixer([model])
    assert [layer.name for layer in handle.layers] == [
        f"Mixture-of-Experts layer {number} (decoder.layers.{number - 1}.mlp on this rank)" for number in (1, 2)
    ]
    assert train(model) == on


def test_removed_it_trains_as_before(off: dict[str, Any]) -> None:
    model = build()
    with apply_densemixer(model):
        pass
    assert train(model) == off


def test_gradients_of_a_step_that_is_not_read_are_forgotten(measured: dict[str, Any]) -> None:
    model = build(moe_densemixer=MEASURED)
    wrapped, _ = wrap([model])
    for _ in range(2):
        wrapped[0].zero_grad_buffer()
        forward_backward(wrapped)
    assert attached_handle(model).metrics() == pytest.approx(measured["metrics"][0], rel=1e-6)


@pytest.mark.parametrize("by_flag", [True, False])
def test_some_layers_only(by_flag: bool) -> None:
    from densemixer_core import DenseMixerConfig

    model = build(moe_densemixer={"layers": "-1:"} if by_flag else False)
    if not by_flag:
        assert len(apply_densemixer(model, DenseMixerConfig(layers="-1:")).layers) == 1
    first, last = norms(train(model, steps=1))
    assert (first[DEAD:] == 0).all()
    assert (last[DEAD:] > 1e-3).all()


def test_the_state_dict_is_megatrons_own() -> None:
    assert build(moe_densemixer=True).state_dict().keys() == build().state_dict().keys()
