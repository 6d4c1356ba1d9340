from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from large import LARGE


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the configuration of Qwen3-30B-A3B. Its model takes seconds to build, so it is built once."""
    import transformers

    from densemixer_adapters.cli import inspection

    folder = tmp_path_factory.mktemp("hub") / "Qwen" / "Qwen3-30B-A3B"
    transformers.Qwen3MoeConfig(**LARGE).save_pretrained(folder)
    build = inspection.build_empty
    once = cache(lambda: build(str(folder)))

    def build_empty(path: str) -> Any:
        return once() if Path(path).resolve() == folder.resolve() else build(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "build_empty", build_empty)
        yield folder
