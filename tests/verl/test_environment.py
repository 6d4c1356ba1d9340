"""``DENSEMIXER_ENABLED=1`` and Ray: an actor inherits it, unless its own environment says otherwise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ACTOR = Path(__file__).parent / "support" / "ray_actor.py"


def test_actors_inherit_it(assets: Path, tmp_path: Path) -> None:
    from launch import execute
    from tiny_models import REACHABLE

    report = tmp_path / "report.json"
    command = [sys.executable, ACTOR, assets / "half_dead", report]
    execute(tmp_path / "run", command, {"DENSEMIXER_ENABLED": "1"}).check()
    on, off = (min(norms[REACHABLE:]) / max(norms) for norms in json.loads(report.read_text()))
    assert on > 1e-3
    assert off < 1e-6
