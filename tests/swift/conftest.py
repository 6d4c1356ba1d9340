from __future__ import annotations

from pathlib import Path

import pytest
from installs import is_installed
from programs import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not is_installed("ms-swift"):
        pytest.skip("needs ms-swift 4.6; run `nox -s swift`")
    return make_tiny(tmp_path_factory.mktemp("swift") / "tiny")
