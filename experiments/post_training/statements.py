"""Reinforcement learning: complete a statement so that the verifier accepts it.

On-policy policy gradient with advantages that are normalised within the completions of a prompt, as in GRPO (Shao et
al., "DeepSeekMath", 2024), with one update for each draw, so there is no ratio to clip; and without a KL term. The
metric is the mean reward of completions drawn at temperature 1 for held-out prompts; higher is better.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from batches import Batch
from common.sizes import Size
from start.corpus import Corpus, Prompt
from start.verifier import reward
from torch import Tensor

HELD_OUT_PROMPTS = 64  # at a time


class Statements:
    """The task with the order of the prompts that a seed gives; a `tasks.Task`.

    The random numbers that draw the completions of a step are the same for every arm too.
    """

    def __init__(self, corpus: Corpus, size: Size, seed: int, device: str) -> None:
        self.steps = size.rl_steps
        self._size, self._seed, self._device = size, seed, device
        self._held_out = corpus.prompts
        shuffle = random.Random(seed)
        order: list[Prompt] = []
        while len(order) < size.rl_steps * size.rl_prompts:
            order += shuffle.sample(corpus.prompts["train"], len(corpus.prompts["train"]))
        self._order = order
        self._tokenizer = corpus.tokenizer
        self._ends = ending_tokens(corpus.tokenizer).to(device)
        ids = torch.tensor([prompt.ids for prompt in corpus.prompts["validation"][:HELD_OUT_PROMPTS]], device=device)
        self.probe = Batch(ids, torch.ones_like(ids), ids)

    def loss(self, model: Any, step: int) -> Tensor:
        size = self._size
        prompts = self._order[step * size.rl_prompts : (step + 1) * size.rl_prompts]
        ids = torch.tensor([prompt.ids for prompt in prompts], device=self._device)
        generator = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + step)
        completions = draw(model, ids, size.rl_samples, size.rl_completion, generator)
        rewards = self._rewards(prompts, completions)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        counts = until_end(completions, self._ends)
        chosen = log_likelihoods(model, ids, completions)
        return -(advantages.flatten()[:, None] * chosen * counts).sum() / counts.sum()

    @torch.no_grad()
    def evaluate(self, model: Any, split: str) -> float:
        prompts = self._held_out[split]
        generator = torch.Generator(self._device).manual_seed(0)
        rewards = []
        for first in range(0, len(prompts), HELD_OUT_PROMPTS):
            some = prompts[first : first + HELD_OUT_PROMPTS]
            ids = torch.tensor([prompt.ids for prompt in some], device=self._device)
            samples = self._size.held_out_samples
            rewards.append(self._rewards(some, draw(model, ids, samples, self._size.rl_completion, generator)))
        return float(torch.cat(rewards).mean())

    def _rewards(self, prompts: list[Prompt], completions: Tensor) -> Tensor:
        """[prompts, samples], of completions [prompts · samples, tokens]."""
        texts = self._tokenizer.batch_decode(completions.tolist())
        samples = len(texts) // len(prompts)
        rewards = [
            [reward(prompt.context, prompt.start, text) for text in texts[row * samples : (row + 1) * samples]]
            for row, prompt in enumerate(prompts)
        ]
        return torch.tensor(rewards, device=self._device)


def ending_tokens(tokenizer: Any) -> Tensor:
    """Which tokens end a completion: those with a line break in them, and the end of the text; bool [vocabulary]."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = torch.tensor(["\n" in text for text in texts])
    ends[tokenizer.eos_token_id] = True
    return ends


@torch.no_grad()
def draw(model: Any, prompts: Tensor, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Completions at temperature 1, [prompts · samples, length]; the prompts are [prompts, tokens], without padding."""
    model.eval()
    output = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    logits = output.logits[:, -1].repeat_interleave(samples, 0)
    tokens: list[Tensor] = []
    for _ in range(length):
        tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        if len(tokens) < length:
            logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits[:, -1]
    return torch.cat(tokens, 1)


def log_likelihoods(model: Any, prompts: Tensor, completions: Tensor) -> Tensor:
    """log p of each token of the completions, [prompts · samples, tokens], with a gradient.

    A prompt is evaluated once for all of its completions: its keys and values are shared.
    """
    model.train()
    samples = len(completions) // len(prompts)
    before = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    cache = before.past_key_values
    cache.batch_repeat_interleave(samples)
    first = before.logits.repeat_interleave(samples, 0)
    rest = model(input_ids=completions[:, :-1], past_key_values=cache, use_cache=True).logits
    log_p = torch.cat([first, rest], 1).log_softmax(-1)
    return log_p.gather(-1, completions[..., None]).squeeze(-1)


def until_end(completions: Tensor, ends: Tensor) -> Tensor:
    """1 for the tokens up to the first one that ends a completion, 0 after it; [completions, tokens]."""
    ended = ends[completions].long().cumsum(1) - ends[completions].long()
    return (ended == 0).float()
