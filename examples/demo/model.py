"""The model to start from: a small Mixture-of-Experts, trained for a moment on the standard library; or the user's."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from settings import DemoError, Settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    get_cosine_schedule_with_warmup,
    logging,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHARACTERS_PER_TOKEN = 8  # twice what the tokenizer makes, so that few windows are read twice
PRETRAIN_LEARNING_RATE = 2e-3

logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # those of loading and saving; the demo shows its own


def on_device(settings: Settings) -> Settings:
    """The settings with the device that "auto" stands for; on a CPU, torch is set to repeat a run exactly.

    Raises:
        DemoError: CUDA is asked for and isn't there.
    """
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise DemoError("--device cuda: torch sees no CUDA device here")
    device = "cuda" if cuda and settings.device != "cpu" else "cpu"
    # With several threads the sums in the backward are otherwise taken in the order in which the threads finish.
    # Filling new memory, which comes with it, only costs time here.
    torch.use_deterministic_algorithms(device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return dataclasses.replace(settings, device=device)


def load(settings: Settings) -> tuple[Any, Any]:
    """The model, in float32 on its device, and its tokenizer.

    Raises:
        DemoError: transformers can't load them.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise DemoError(
            f"{settings.model}: no checkpoint folder or hub model that transformers can load: {error}"
        ) from None
    return model.to(settings.device), tokenizer


def pretrain(files: list[Path], settings: Settings) -> None:
    """Train a tokenizer and a model on source files and save both where `load` looks."""
    settings = on_device(settings)
    torch.manual_seed(settings.seed)
    text = _corpus(files, settings)
    tokenizer = train_tokenizer(text)
    model = _small_moe(tokenizer).to(settings.device)
    ids = torch.tensor(tokenizer("".join(text))["input_ids"])
    windows = ids[: len(ids) // settings.max_length * settings.max_length].view(-1, settings.max_length)

    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LEARNING_RATE)
    scheduler = get_cosine_schedule_with_warmup(optimizer, settings.pretrain_steps // 20, settings.pretrain_steps)
    progress = tqdm(range(settings.pretrain_steps), "pretraining", unit="step", disable=None)
    for _ in progress:
        batch = windows[torch.randint(len(windows), (settings.batch_size,))].to(settings.device)
        # The balancing loss that such models are pretrained with; without it a few experts would take all tokens.
        loss = model(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.2f}")

    model.save_pretrained(settings.model)
    tokenizer.save_pretrained(settings.model)


def _corpus(files: list[Path], settings: Settings) -> list[str]:
    enough = settings.pretrain_steps * settings.batch_size * settings.max_length * CHARACTERS_PER_TOKEN
    shuffled = random.Random(settings.seed).sample(files, len(files))
    corpus: list[str] = []
    size = 0
    for file in shuffled:
        corpus.append(file.read_text(encoding="utf-8") + "<|end|>")
        size += len(corpus[-1])
        if size > enough:
            break
    return corpus


def train_tokenizer(corpus: list[str], vocabulary: int = 3072) -> Any:
    """Byte-level BPE with a chat template, for a small model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def _small_moe(tokenizer: Any) -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            router_aux_loss_coef=0.01,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
