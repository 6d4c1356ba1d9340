from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from installs import is_installed

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Automodel compiles its activations, for minutes each on a CPU

sys.path.append(str(Path(__file__).parents[2] / "examples" / "automodel"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not is_installed("nemo-automodel"):
        for item in items:
            if item.path.parent.name == "automodel":
                item.add_marker(pytest.mark.skip(reason="needs nemo-automodel; run `nox -s automodel`"))
