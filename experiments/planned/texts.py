"""Text that no start model was pretrained on, and that every machine with the pinned environment has.

It is split by text, so that none is in two parts; what two packages bring alike is there once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-not-found]
from typing import Any

import torch
from torch import Tensor

PINS = Path(__file__).parents[2] / "ci" / "environments" / "transformers-5.24.0.txt"
SPLIT_SEED = 0
LONGEST = 16_000  # characters of a text: no single one may be most of what there is
SHORTEST = 200
SHARES = {"train": 0.75, "validation": 0.1, "test": 0.15}

HEADERS = (".h", ".hpp", ".cuh")
WITH_HEADERS = ("numpy", "pyarrow", "triton")
LICENCES = ("licen", "copying", "notice", "authors")


def headers_and_licences() -> Iterator[str]:
    """C and C++ headers of three packages, and the licences of all."""
    for name in WITH_HEADERS:
        yield from _files(distribution(name), lambda path: path.endswith(HEADERS))
    for package in _packages():
        yield from _files(
            package, lambda path: ".dist-info/" in path and any(word in path.lower() for word in LICENCES)
        )


def documentation() -> Iterator[str]:
    """English prose about programs: the reference of the language that comes with Python, and packages' own pages."""
    yield from topics.values()
    for package in _packages():
        yield str(package.metadata.get_payload())


TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    "headers and licences": headers_and_licences,
    "documentation": documentation,
}


def token_ids(kind: str, tokenizer: Any, limit: int) -> dict[str, Tensor]:
    """For each split, the texts one after the other, [tokens], int64; ``limit`` texts in all.

    The same for the same interpreter and pins.
    """
    texts = sorted({text[:LONGEST] for text in TEXTS[kind]() if len(text) >= SHORTEST})
    texts = random.Random(SPLIT_SEED).sample(texts, min(limit, len(texts)))
    parts, first = {}, 0
    for split, share in SHARES.items():
        last = first + round(share * len(texts))
        rows = tokenizer(texts[first:last], add_special_tokens=False)["input_ids"]
        parts[split] = torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])
        first = last
    return parts


def _packages() -> Iterator[Distribution]:
    """What the environment pins, without torch, which comes in several builds."""
    for line in PINS.read_text(encoding="utf-8").splitlines():
        name, pinned, _ = line.partition("==")
        if pinned and not line.startswith("#") and name != "torch":
            yield distribution(name)


def _files(package: Distribution, wanted: Callable[[str], bool]) -> Iterator[str]:
    """The package's text files whose path is wanted."""
    for path in package.files or ():
        if wanted(str(path)):
            yield Path(str(path.locate())).read_text(encoding="utf-8", errors="replace")
