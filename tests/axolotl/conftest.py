from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from installs import is_installed
from programs import EXAMPLES, Report, make_tiny, train

Train = Callable[..., Report]
PLUGIN = "densemixer_adapters.axolotl.DenseMixerPlugin"


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
        found = {**base, "learning_rate": 0.5, **keys}
        (folder / "tiny").symlink_to(tiny)
        path = folder / "my.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in found.items() if value is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def axolotl(configure: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``axolotl train`` with the probe among its plugins."""

    def run(*options: str, plugin: str | None = PLUGIN, env: dict[str, str] | None = None, **keys: Any) -> Report:
        folder = tmp_path_factory.mktemp("run")
        plugins = [*([plugin] if plugin else []), "probe_plugin.ProbePlugin"]
        configure(folder, plugins=plugins, **keys)
        variables = {"AXOLOTL_DO_NOT_TRACK": "1", **(env or {})}
        return train(["axolotl", "train", "my.yaml", *options], folder, Path(__file__).parent, **variables)

    return run
