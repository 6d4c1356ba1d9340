from __future__ import annotations

import pytest
from installs import is_installed
from llamafactory_runs import LlamaFactory
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session")
def llamafactory(tmp_path_factory: pytest.TempPathFactory) -> LlamaFactory:
    if not is_installed("llamafactory"):
        pytest.skip("needs llamafactory 0.9.5; run `nox -s llamafactory`")
    return LlamaFactory(tmp_path_factory.mktemp("llamafactory"))


@pytest.fixture(scope="session")
def start(llamafactory: LlamaFactory) -> dict[str, Tensor]:
    """The weights before training."""
    return load_file(llamafactory.model / "model.safetensors")
