from __future__ import annotations

import importlib.util

import pytest
from llamafactory_runs import LlamaFactory
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session")
def llamafactory(tmp_path_factory: pytest.TempPathFactory) -> LlamaFactory:
    if importlib.util.find_spec("llamafactory") is None:
        pytest.skip("needs llamafactory 0.9.5; run `nox -s llamafactory`")
    return LlamaFactory(tmp_path_factory.mktemp("llamafactory"))


@pytest.fixture(scope="session")
def start(llamafactory: LlamaFactory) -> dict[str, Tensor]:
    """The weights before training."""
    return load_file(llamafactory.model / "model.safetensors")
