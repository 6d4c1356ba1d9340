from __future__ import annotations

import os

import pytest
from installs import is_installed

os.environ["MODELING_BACKEND"] = "veomni"

collect_ignore_glob = [] if is_installed("veomni") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def without_gpu() -> None:
    import stand_ins

    stand_ins.install()
