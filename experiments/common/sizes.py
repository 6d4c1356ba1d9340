"""How large the model, the training runs and the measurements are."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of the experiment. Lengths are in tokens.

    Attributes:
        ffn: Width of one expert.
        window: Length of a sequence in pretraining.
        pretrain_rows: Sequences of a step of pretraining.
        sft_length: Prompt and docstring together; longer examples are left out.
        sft_rows: Examples of a step.
        rl_prompts: Prompts of a step.
        rl_samples: Completions drawn for each of them; their rewards are compared with each other.
        rl_prompt: Length of every prompt.
        rl_completion: The most that is drawn of a completion.
        files: Of the standard library, at most.
        train, validation, test: Examples (SFT) and prompts (RL) of these splits, at most.
        held_out_samples: Completions drawn for each held-out prompt.
        sft_rates, rl_rates: The learning rates that are tried for every arm.
        tuning_seeds: Runs for each of them, on seeds of their own.
        seeds: Runs of each arm afterwards.
        quality_sequences, quality_tokens: Held-out sequences, and tokens of each, on which routing is changed.
        quality_length: Length of such a sequence.
    """

    hidden: int
    layers: int
    heads: int
    experts: int
    top_k: int
    ffn: int
    vocabulary: int
    window: int
    pretrain_rows: int
    pretrain_steps: int
    sft_length: int
    sft_rows: int
    sft_steps: int
    rl_prompts: int
    rl_samples: int
    rl_prompt: int
    rl_completion: int
    rl_steps: int
    files: int
    train: int
    validation: int
    test: int
    held_out_samples: int
    sft_rates: tuple[float, ...]
    rl_rates: tuple[float, ...]
    tuning_seeds: int
    seeds: int
    quality_sequences: int
    quality_tokens: int
    quality_length: int


SMALL = Size(
    hidden=96,
    layers=3,
    heads=4,
    experts=16,
    top_k=2,
    ffn=64,
    vocabulary=2048,
    window=128,
    pretrain_rows=32,
    pretrain_steps=800,
    sft_length=160,
    sft_rows=8,
    sft_steps=150,
    rl_prompts=8,
    rl_samples=8,
    rl_prompt=48,
    rl_completion=16,
    rl_steps=50,
    files=1000,  # all there are
    train=4000,
    validation=128,
    test=512,
    held_out_samples=4,
    sft_rates=(1e-4, 3e-4, 1e-3),
    rl_rates=(2e-4, 6e-4, 2e-3),
    tuning_seeds=2,
    seeds=8,
    quality_sequences=64,
    quality_tokens=4,
    quality_length=64,
)

SIZES = {
    "tiny": dataclasses.replace(  # for the tests
        SMALL,
        hidden=32,
        layers=2,
        heads=2,
        experts=8,
        ffn=16,
        vocabulary=384,
        window=64,
        pretrain_rows=8,
        pretrain_steps=10,
        sft_rows=2,
        sft_steps=4,
        rl_prompts=2,
        rl_samples=4,
        rl_completion=8,
        rl_steps=4,
        files=80,
        train=64,
        validation=8,
        test=8,
        held_out_samples=1,
        sft_rates=(1e-3, 1e-2),
        rl_rates=(1e-3, 1e-2),
        tuning_seeds=1,
        seeds=2,
        quality_sequences=3,
        quality_tokens=2,
        quality_length=24,
    ),
    "small": SMALL,
    "large": dataclasses.replace(
        SMALL,
        hidden=512,
        layers=8,
        heads=8,
        experts=64,
        top_k=8,
        ffn=256,
        vocabulary=4096,
        window=256,
        pretrain_rows=64,
        pretrain_steps=3000,
        sft_length=384,
        sft_rows=16,
        sft_steps=300,
        rl_prompts=16,
        rl_samples=16,
        rl_prompt=96,
        rl_completion=24,
        rl_steps=150,
        validation=256,
        test=1024,
        sft_rates=(1e-4, 3e-4, 1e-3),
        rl_rates=(3e-5, 1e-4, 3e-4),
        quality_length=128,
    ),
}
