from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from installs import is_installed
from programs import EXAMPLES, RATE, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not is_installed("axolotl"):
        pytest.skip("needs axolotl 0.19; run `nox -s axolotl`")
    return make_tiny(tmp_path_factory.mktemp("axolotl") / "tiny")


@pytest.fixture(scope="session")
def configure(tiny: Path) -> Callable[..., Path]:
    """Writes the YAML of the example for CPUs with other keys, each into a folder of its own; None leaves a key out."""
    base = yaml.safe_load((EXAMPLES / "axolotl" / "cpu.yaml").read_text())

    def write(folder: Path, **keys: Any) -> Path:
        found = {**base, "learning_rate": RATE, **keys}
        (folder / "tiny").symlink_to(tiny)
        path = folder / "my.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in found.items() if value is not None}))
        return path

    return write
