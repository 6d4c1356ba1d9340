"""verl's training worker on two FSDP2 ranks: what its settings do to the gradients, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SETTINGS = (
    "plain",
    "padded",
    "no checkpointing",
    "dynamic batch sizes",
    "packed to buckets",
    "keep parameters after the forward",
    "reduce every micro-batch",
    "CPU offload",
    "Ulysses",
    "centered",
    "nested",
    "LoRA on routers",
    "LoRA on routers and experts",
    "LoRA on all linear layers",
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def report(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from launch import torchrun

    folder = tmp_path_factory.mktemp("engines") / "run"
    torchrun(folder, Path(__file__).parent / "engines.py", assets, folder / "report.json", ranks=2).check()
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_to_the_oracle(report: dict[str, Any], setting: str) -> None:
    assert report[setting]["error against the oracle"] < TOLERANCE
    assert report[setting]["difference from conventional"] > 0.1
    assert report[setting]["layers"] == 2


@pytest.mark.parametrize("setting", ["off", "LoRA off", "LoRA without routers", "conventional"])
def test_conventional_where_it_should_be(report: dict[str, Any], setting: str) -> None:
    assert report[setting]["error against the oracle"] < TOLERANCE
    assert report[setting]["difference from conventional"] < TOLERANCE


@pytest.mark.parametrize("setting", ["plain", "LoRA on routers", "LoRA on all linear layers", "LoRA off"])
def test_no_warning_where_routers_are_trained_or_nobody_asked(report: dict[str, Any], setting: str) -> None:
    assert report[setting]["warnings"] == []


@pytest.mark.parametrize("setting", ["LoRA without routers", "environment, LoRA without routers"])
def test_frozen_routers_are_one_warning_with_the_fix(report: dict[str, Any], setting: str) -> None:
    """In terms of verl's settings, whatever has switched DenseMixer on."""
    (warning,) = report[setting]["warnings"]
    assert "nothing to train in 2 of 2 layers, whose routers are frozen (model.layers.0.mlp.gate and 1 more)" in warning
    assert warning.endswith("Set +…model.target_parameters=[mlp.gate.weight] for this role to train them.")


def test_nothing_is_attached_where_nothing_is_trained_or_wanted(report: dict[str, Any]) -> None:
    assert report["reference"] == {"layers": 0}
    assert report["off"]["layers"] == 0
    assert report["off"]["metrics"] == {}


def test_passes_without_gradients_run_no_operation_more(report: dict[str, Any]) -> None:
    counts = {name: report[name]["operations without gradients"] for name in ("off", "plain", "centered", "nested")}
    assert set(counts.values()) == {counts["off"]}
    assert counts["off"] > 0


def test_the_key_takes_precedence_over_the_environment(report: dict[str, Any]) -> None:
    assert report["environment"]["layers"] == 2
    assert report["environment, off"]["layers"] == 0


@pytest.mark.parametrize("setting", ["padded", "dynamic batch sizes", "centered", "conventional"])
def test_the_metrics_are_those_of_the_oracle(report: dict[str, Any], setting: str) -> None:
    metrics, expected = report[setting]["metrics"], report[setting]["expected"]
    for name, value in expected.items():
        assert metrics[f"densemixer/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_metrics_are_an_option(report: dict[str, Any]) -> None:
    """The gradients are still the oracle's, with a forward more in the middle: settings above."""
    assert report["plain"]["metrics"] == {}
    metrics, expected = report["padded"]["metrics"], report["padded"]["expected"]
    names = {
        *expected,
        "router_grad_cosine_conventional",
        "load_entropy",
        "load_max_over_mean",
        "routing_change",
        "logit_drift",
        "updates_lost",
    }
    assert metrics.keys() == {f"densemixer/{place}{name}" for place in ("", "layer_0/", "layer_1/") for name in names}
    for name, value in expected.items():
        assert metrics[f"densemixer/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-7)
    assert 0 < metrics["densemixer/load_entropy"] <= 1 <= metrics["densemixer/load_max_over_mean"]
    assert metrics["densemixer/logit_drift"] > 0  # after the step
    assert metrics["densemixer/updates_lost"] < 0.01


@pytest.mark.parametrize(
    ("setting", "messages"),
    [
        ("no experts", ["override_config.densemixer for", "has no Mixture-of-Experts layers", "switch it off"]),
        ("layers that do not exist", ["layers=(7,): the model has 2 Mixture-of-Experts layers"]),
        ("quantisation-aware", ["quantisation-aware training (qat.enable)"]),
    ],
)
def test_refused(report: dict[str, Any], setting: str, messages: list[str]) -> None:
    assert all(message in report[setting]["error"] for message in messages), report[setting]
