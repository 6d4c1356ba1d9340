"""From examples to padded batches of token ids."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from data import Example
from settings import DemoError
from torch import Tensor

IGNORED = -100  # the label that the loss of transformers skips


class Batch(NamedTuple):
    """Right-padded token ids, their mask, and the labels; all [examples, tokens], int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))

    @property
    def answers(self) -> int:
        """The number of tokens that count in the loss; the first of a row has nothing that predicts it."""
        return int((self.labels[:, 1:] != IGNORED).sum())


class Encoded(NamedTuple):
    """One tokenised example: prompt and completion, and how many of the ids are prompt."""

    ids: list[int]
    prompt_length: int


def encode(examples: list[Example], tokenizer: Any, max_length: int, limit: int) -> list[Encoded]:
    """Tokenise up to ``limit`` examples, with the tokenizer's chat template if it has one; leave out what doesn't fit.

    Raises:
        DemoError: None fits.
    """
    encoded: list[Encoded] = []
    for example in examples:
        if len(encoded) == limit:
            break
        prompt = example.prompt
        if tokenizer.chat_template:
            message = {"role": "user", "content": prompt}
            prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt_ids) + len(answer_ids) <= max_length:
            encoded.append(Encoded(prompt_ids + answer_ids, len(prompt_ids)))
    if not encoded:
        raise DemoError(f"none of {len(examples)} examples fits into {max_length} tokens; raise --max-length")
    return encoded


def collate(examples: list[Encoded], pad_id: int) -> Batch:
    """One batch; only completions have labels."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, example.prompt_length : len(tokens)] = tokens[example.prompt_length :]
    return Batch(ids, mask, labels)


def schedule(examples: list[Encoded], steps: int, batch_size: int, pad_id: int, seed: int) -> list[Batch]:
    """The batches of a training run, in order: as many shuffled epochs as it takes."""
    shuffle = random.Random(seed)
    order: list[Encoded] = []
    while len(order) < steps * batch_size:
        order += shuffle.sample(examples, len(examples))
    return [collate(order[step * batch_size : (step + 1) * batch_size], pad_id) for step in range(steps)]
