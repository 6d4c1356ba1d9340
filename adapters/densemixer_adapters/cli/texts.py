"""Text in files, as batches for a language model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densemixer_adapters.cli.printable import one_line

_CHARACTERS = 1 << 16
"""Of a .txt file, that are read at a time."""


class UnusableDataError(Exception):
    """The data can't be used. The message says why, and what to do."""


def batches_of(data: Path, tokenizer: Any, count: int, sequences: int, length: int) -> list[dict[str, Tensor]]:
    """Batches of ``input_ids``, [sequences, length] each.

    The texts come one after the other, each with the end that the tokenizer knows, and are cut into sequences; these
    are shuffled, as training does. It reads no more of the file than it needs.

    Args:
        data: A ``.txt`` file, which is one text; or a ``.jsonl`` file, each line of which is an object with a ``text``,
            or with ``messages`` that the tokenizer's chat template knows.
        tokenizer: Of transformers.
        count: How many batches.
        sequences: Of a batch.
        length: Of a sequence, in tokens.

    Raises:
        UnusableDataError: The file can't be read, is of another kind, or is too short.
    """
    needed = count * sequences * length
    ids: list[int] = []
    try:
        for text in _read(data):
            ids += _tokens(text, tokenizer)
            if len(ids) >= needed:
                break
    except UnicodeDecodeError as error:
        raise UnusableDataError(f"{data} isn't UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UnusableDataError(f"can't read {data}: {error.strerror}") from None
    if len(ids) < needed:
        raise UnusableDataError(
            f"{data} has {len(ids)} tokens, and {count} batches of {sequences} sequences of {length} need {needed}: "
            "give more text, or lower --seq-len, --batch-size or --batches"
        )
    rows = torch.tensor(ids[:needed]).view(-1, length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return [{"input_ids": batch} for batch in rows.chunk(count)]


def _read(data: Path) -> Iterator[Any]:
    """Texts or lists of messages; of a ``.txt`` file, its parts, as bare strings."""
    if data.suffix not in (".txt", ".jsonl"):
        raise UnusableDataError(f"{data}: data is a .txt file, or a .jsonl file with `text` or `messages` in each line")
    if not data.is_file():  # a pipe, say, would wait for somebody to write
        raise UnusableDataError(f"{data}: {'no ordinary file' if data.exists() else 'no such file'}")
    with data.open(encoding="utf-8") as file:
        if data.suffix == ".txt":
            while part := file.read(_CHARACTERS):
                yield part
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row(line, f"{data}, line {number}")


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UnusableDataError(f"{where}: no JSON") from None
    if isinstance(row, dict) and (isinstance(row.get("text"), str) or _are_messages(row.get("messages"))):
        return row
    raise UnusableDataError(f"{where}: no object with a `text`, or with `messages`")


def _are_messages(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(one, dict) and "role" in one for one in found)


def _tokens(text: Any, tokenizer: Any) -> list[int]:
    if isinstance(text, str):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if isinstance(text.get("text"), str):
        ids = list(tokenizer(text["text"])["input_ids"])
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]
    try:
        return list(tokenizer.apply_chat_template(text["messages"], tokenize=True, return_dict=False))
    except Exception as error:  # whatever a template raises
        raise UnusableDataError(f"the tokenizer's chat template can't use `messages`: {one_line(error)}") from None
