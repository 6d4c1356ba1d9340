"""Real text: the source of the standard library of this interpreter, split by file.

One part of the files pretrains the start model. The others give the tasks of post-training, each with examples to train
on, to choose learning rates by, and to test on; no file is in two parts.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from batches import Encoded, encode
from common.sizes import Size
from data import library_examples, library_files
from model import train_tokenizer
from start.verifier import reward
from torch import Tensor

SPLIT_SEED = 0
PRETRAINING = 0.55  # of the files
SHARES = {"train": 0.25, "validation": 0.07, "test": 0.13}
STATEMENT_LENGTH = range(20, 80)  # characters
SIMPLE = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.Assert, ast.Raise)


class Prompt(NamedTuple):
    """A statement to complete.

    Attributes:
        ids: What the model sees; its end is the beginning of the statement.
        context: The text of that before the statement.
        start: The text of the statement's beginning, without indentation.
    """

    ids: list[int]
    context: str
    start: str


class Corpus(NamedTuple):
    """All text of the experiment as token ids.

    Attributes:
        tokenizer: Made of the text that pretrains.
        pretraining: The files that pretrain, one after the other, [tokens], int64.
        unseen: The files of the test split in the same form.
        docstrings: For each split, pairs of a function and its docstring.
        prompts: For each split, statements to complete.
    """

    tokenizer: Any
    pretraining: Tensor
    unseen: Tensor
    docstrings: dict[str, list[Encoded]]
    prompts: dict[str, list[Prompt]]


def make_corpus(size: Size) -> Corpus:
    """The same for the same interpreter and size."""
    pretraining, parts = split_files(library_files(), size.files)
    tokenizer = train_tokenizer([_text(file) for file in pretraining], size.vocabulary)
    docstrings: dict[str, list[Encoded]] = {}
    prompts: dict[str, list[Prompt]] = {}
    for name, files in parts.items():
        shuffle = random.Random(SPLIT_SEED)
        examples = list(dict.fromkeys(library_examples(files)))
        shuffle.shuffle(examples)
        limit = {"train": size.train, "validation": size.validation, "test": size.test}[name]
        docstrings[name] = encode(examples, tokenizer, size.sft_length, limit)
        prompts[name] = _prompts(files, tokenizer, size.rl_prompt, limit, shuffle)
    return Corpus(tokenizer, _ids(pretraining, tokenizer), _ids(parts["test"], tokenizer), docstrings, prompts)


def split_files(files: list[Path], limit: int) -> tuple[list[Path], dict[str, list[Path]]]:
    """Of ``limit`` files, those that pretrain, and those of the three splits of post-training."""
    files = random.Random(SPLIT_SEED).sample(files, len(files))[:limit]
    first = round(PRETRAINING * len(files))
    pretraining, parts = files[:first], {}
    for name, share in SHARES.items():
        last = first + round(share * len(files))
        parts[name], first = files[first:last], last
    return pretraining, parts


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _ids(files: list[Path], tokenizer: Any) -> Tensor:
    rows = [[*tokenizer(_text(file), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for file in files]
    return torch.tensor([token for row in rows for token in row])


def _prompts(files: list[Path], tokenizer: Any, length: int, limit: int, shuffle: random.Random) -> list[Prompt]:
    """Statements, cut at a random place between two tokens, with the source before them: ``length`` tokens in all.

    Those that don't pass the verifier as they are stay out, so there is at least one right completion for each.
    """
    statements = [(source, *place) for source in map(_text, files) for place in _statements(source)]
    shuffle.shuffle(statements)
    prompts: list[Prompt] = []
    for source, begin, end in statements:
        if len(prompts) == limit:
            break
        # Tokens of a little more than what fits, for their offsets.
        first = max(0, begin - 8 * length)
        encoding = tokenizer(source[first:end], add_special_tokens=False, return_offsets_mapping=True)
        offsets = [first + offset for offset, _ in encoding["offset_mapping"]]
        inside = (end - begin) / 4
        cuts = [i for i, offset in enumerate(offsets) if begin + inside <= offset <= end - inside and i >= length]
        if not cuts:
            continue
        cut = shuffle.choice(cuts)
        context, start = source[offsets[cut - length] : begin], source[begin : offsets[cut]]
        if reward(context, start, source[offsets[cut] : end] + "\n"):
            prompts.append(Prompt(encoding["input_ids"][cut - length : cut], context, start))
    return prompts


def _statements(source: str) -> Iterator[tuple[int, int]]:
    """Where the simple statements inside of functions begin and end that are on one line of ASCII characters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    found = {
        (begins[node.lineno - 1] + node.col_offset, begins[node.lineno - 1] + (node.end_col_offset or 0))
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, SIMPLE) and node.lineno == node.end_lineno and lines[node.lineno - 1].isascii()
    }
    for begin, end in sorted(found):
        if end - begin in STATEMENT_LENGTH:
            yield begin, end
