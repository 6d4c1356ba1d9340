from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("verl") is None:
        pytest.skip("needs verl 0.9.1; run `nox -s verl`")
    from assets import make_assets

    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder
