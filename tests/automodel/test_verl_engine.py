"""verl's engine ``automodel`` on two FSDP2 ranks: transformers' models trained by the key, Automodel's own refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import scripts
from installs import is_installed

pytestmark = pytest.mark.skipif(not is_installed("verl"), reason="needs verl; run `nox -s automodel`")

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "verl"))
    from assets import make_assets
    from launch import torchrun

    folder = tmp_path_factory.mktemp("verl")
    (folder / "assets").mkdir()
    make_assets(folder / "assets")
    script = Path(__file__).parent / "verl_engine.py"
    environment = {"FIRST": os.pathsep.join(scripts.FOLDERS), "TORCHDYNAMO_DISABLE": "1"}
    torchrun(folder / "run", script, folder / "assets", folder / "report.json", ranks=2, **environment).check()
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("case", ["plain", "centered", "checkpointing", "measured"])
def test_gradients_are_those_of_the_oracle(report: dict[str, Any], case: str) -> None:
    assert report[case]["error against the oracle"] <= TOLERANCE
    assert report[case]["difference from conventional"] > 0.1
    assert report[case]["layers"] == 2
    assert report[case]["warnings"] == []


def test_nothing_is_attached_where_nothing_is_trained_or_wanted(report: dict[str, Any]) -> None:
    assert report["reference"] == {"layers": 0}
    assert report["off"]["layers"] == 0
    assert report["off"]["error against the oracle"] <= TOLERANCE
    assert report["off"]["difference from conventional"] <= TOLERANCE


def test_what_isnt_a_gradient_is_as_without(report: dict[str, Any]) -> None:
    for case in ("plain", "measured"):
        assert report[case]["loss"] == report["off"]["loss"]
        assert report[case]["names"] == report["off"]["names"]
        assert not report[case]["ours in its configuration"]


def test_metrics_are_an_option(report: dict[str, Any]) -> None:
    assert report["plain"]["metrics"] == {}
    assert 0 < report["measured"]["metrics"]["densemixer/router_grad_share_unselected"] < 1
    assert report["measured"]["metrics"]["densemixer/layer_1/logit_drift"] > 0  # after the step


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("no experts", ["override_config.densemixer for", "has no Mixture-of-Experts layers", "switch it off"]),
        ("layers that do not exist", ["layers=(7,): the model has 2 Mixture-of-Experts layers"]),
        (
            "own layers, EP 2",
            ["the dispatcher torch gives the router no gradient at all", "0.6.0 mends", "no expert parallelism"],
        ),
    ],
)
def test_refused(report: dict[str, Any], case: str, messages: list[str]) -> None:
    assert all(message in report[case]["error"] for message in messages), report[case]
