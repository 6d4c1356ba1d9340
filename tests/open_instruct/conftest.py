from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "running"), str(TESTS / "transformers")]  # whose model, batch and oracle are used here


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `model`, and `batch.pt`."""
    pytest.importorskip("transformers", reason="needs transformers; run `nox -s llamafactory`")
    import torch
    from setting import batch, build

    folder = tmp_path_factory.mktemp("open_instruct")
    build().save_pretrained(folder / "model")
    torch.save(batch(), folder / "batch.pt")
    return folder
