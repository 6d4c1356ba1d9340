"""Router metrics of two ranks are those of one process with the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from installs import is_installed
from ranks import run_script

SETTINGS = (
    "DDP",
    "FSDP1",
    "FSDP2",
    "FSDP2, routers and experts wrapped",
    "FSDP2, checkpointing reentrant",
    "FSDP2, checkpointing non-reentrant",
    "ZeRO-3",
    "ZeRO-3, checkpointing reentrant",
    "ZeRO-3, Trainer",
)

pytestmark = pytest.mark.skipif(not is_installed("deepspeed"), reason="needs deepspeed; run `nox -s transformers`")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("metrics")
    found: dict[str, Any] = run_script(Path(__file__).with_name("on_ranks.py"), folder / "report.json", ranks=2)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_like_one_process(report: dict[str, Any], setting: str) -> None:
    found, alone = report[setting], report["alone"]
    assert isinstance(found, list), found
    for step, (metrics, expected) in enumerate(zip(found, alone, strict=True)):
        # Under ZeRO-3 the optimizer steps float32 copies of what it partitions; in a flat parameter of FSDP1 routers
        # have no part of their own.
        known = {name for name in expected if "updates_lost" not in name or not setting.startswith(("ZeRO", "FSDP1"))}
        assert metrics.keys() == known
        for name in known:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (step, name)
    assert alone[1]["densemixer/routing_change"] > 0.01
    assert 0 < alone[0]["densemixer/router_grad_share_unselected"] < 1


def test_a_rank_that_can_not_measure_stops_no_other(report: dict[str, Any]) -> None:
    assert report["one rank fails"] == "on another rank"
