from __future__ import annotations

from pathlib import Path

import pytest


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
