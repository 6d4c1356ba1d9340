"""verl's training worker with its engine ``veomni`` on two ranks: experts on each, and spread over both."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VERL = HERE.parent / "verl"
TRAINED = ("EP 1", "EP 2", "EP 2, no checkpointing", "EP 2, centered", "EP 1, critic", "EP 2, router replay")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sys.path.append(str(VERL))
    from assets import make_assets
    from launch import torchrun

    folder = tmp_path_factory.mktemp("engine")
    make_assets(folder)
    first = os.pathsep.join([str(HERE), str(VERL)])
    settings = {"FIRST": first, "VERL_USE_EXTERNAL_MODULES": "cpu_platform"}
    torchrun(folder / "run", HERE / "engine.py", folder, folder / "report.json", ranks=2, **settings).check()
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("case", TRAINED)
def test_gradients_equal_the_oracle(report: dict[str, Any], case: str) -> None:
    result = report[case]
    assert result["error"] < 1e-5
    assert result["difference"] > 0.1
    assert result["layers"] == 2


@pytest.mark.parametrize("case", ["EP 1, off", "EP 2, off", "LoRA, off"])
def test_nothing_is_there_without_the_key(report: dict[str, Any], case: str) -> None:
    result = report[case]
    assert result["error"] < 1e-5
    assert result["difference"] < 1e-5
    assert result["layers"] == 0
    assert result["metrics"] == {}


def test_a_reference_policy_is_left_alone(report: dict[str, Any]) -> None:
    assert report["reference"]["layers"] == 0


@pytest.mark.parametrize("case", ["EP 1", "EP 2", "EP 2, centered"])
def test_loss_log_probabilities_and_exported_weights_are_as_without_it(report: dict[str, Any], case: str) -> None:
    assert report[case]["as without"] == {"loss": True, "inferred": True, "exported": True}


def test_the_key_stays_out_of_the_models_configuration(report: dict[str, Any]) -> None:
    assert not any(result.get("config") for result in report.values())


@pytest.mark.parametrize("case", ["EP 2, centered", "EP 2, router replay"])
def test_metrics(report: dict[str, Any], case: str) -> None:
    metrics, norm = report[case]["metrics"], report[case]["norm"]
    assert metrics["densemixer/router_grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert 0.1 < metrics["densemixer/router_grad_share_unselected"] < 0.99
    assert metrics["densemixer/updates_lost"] < 0.01
    # A step at a small learning rate hardly changes what routers choose by themselves, whatever is replayed.
    assert metrics["densemixer/routing_change"] < 0.2
    assert metrics["densemixer/logit_drift"] > 0


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("LoRA", ["override_config.densemixer", "ignores lora_rank=4", "strategy=fsdp2"]),
        ("quantisation-aware", ["override_config.densemixer", "qat_implementation=fp8_blockwise"]),
        ("no experts", ["override_config.densemixer for", "has no Mixture-of-Experts layers"]),
    ],
)
def test_refused(report: dict[str, Any], case: str, messages: list[str]) -> None:
    assert all(message in report[case]["error"] for message in messages), report[case]
