"""verl's Megatron backend builds its models on GPUs; what comes before that and after it runs without."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from launch import execute

    if "MEGATRON_CORE" not in os.environ:
        pytest.skip("needs MEGATRON_CORE, a folder with it; run `nox -s verl`")
    first = os.pathsep.join([os.environ["MEGATRON_CORE"], str(Path(__file__).parents[1] / "megatron")])
    script = Path(__file__).with_name("megatron_engine.py")
    run = execute(tmp_path_factory.mktemp("megatron") / "run", [sys.executable, script], {"FIRST": first}).check()
    found: dict[str, Any] = json.loads(run.output.splitlines()[-1])
    return found


def test_the_key_reaches_the_configuration_of_megatron_core(report: dict[str, Any]) -> None:
    """verl drops, with a warning, every key that Megatron's class doesn't have."""
    assert report["converted"] == {"estimator": "centered"}
    assert "moe_densemixer: unknown option" in report["misspelt"]


def test_its_engine_reports_router_metrics(report: dict[str, Any]) -> None:
    metrics = report["metrics"]
    assert metrics["densemixer/router_grad_norm"] == pytest.approx(report["norm"], rel=1e-5)
    assert 0.01 < metrics["densemixer/layer_1/router_grad_share_unselected"] < 0.99
    assert len(metrics) == 3 * 5  # of two layers, and of both
    assert report["without the option"] == {}
