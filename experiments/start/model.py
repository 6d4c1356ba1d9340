"""The start model: a small Mixture-of-Experts, pretrained once; all runs begin from it."""

from __future__ import annotations

import dataclasses
import json
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from common.sizes import Size
from rich.console import Console
from rich.progress import track
from start.corpus import Corpus, make_corpus
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    get_cosine_schedule_with_warmup,
    logging,
)

LEARNING_RATE = 2e-3

logging.disable_progress_bar()


def prepare(size: Size, folder: Path, device: str, console: Console) -> None:
    """Make corpus and start model in the folder, unless they are there already in this size."""
    made_of, numbers = dataclasses.asdict(size), folder / "start.json"
    if numbers.exists() and json.loads(numbers.read_text())["size"] == json.loads(json.dumps(made_of)):
        console.print(f"start model: {folder}, as it is")
        return
    folder.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(size)
    (folder / "corpus.pickle").write_bytes(pickle.dumps(corpus))
    began = time.perf_counter()
    model = small_model(size, corpus.tokenizer).to(device)
    loss = _pretrain(model, corpus, size, device, console)
    model.save_pretrained(folder)
    unseen = loss_on(model, corpus.unseen, size, device)
    facts = {
        "size": made_of,
        "seconds": time.perf_counter() - began,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pretraining_tokens": len(corpus.pretraining),
        "loss": loss,
        "loss_on_unseen_files": unseen,
        "docstrings": {name: len(examples) for name, examples in corpus.docstrings.items()},
        "prompts": {name: len(prompts) for name, prompts in corpus.prompts.items()},
    }
    numbers.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"start model: {facts['parameters'] / 1e6:.2f} million parameters; nats per token: {loss:.2f} in training, "
        f"{unseen:.2f} on unseen files"
    )


def load_corpus(folder: Path) -> Corpus:
    """What `prepare` left there."""
    corpus: Corpus = pickle.loads((folder / "corpus.pickle").read_bytes())
    return corpus


def load_model(folder: Path, device: str) -> Any:
    """The start model, in float32."""
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def small_model(size: Size, tokenizer: Any) -> Any:
    """A model of Qwen3-MoE's architecture with random weights. The selected scores are renormalised, as in Qwen3."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            head_dim=size.hidden // size.heads,
            num_experts=size.experts,
            num_experts_per_tok=size.top_k,
            moe_intermediate_size=size.ffn,
            router_aux_loss_coef=0.01,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _pretrain(model: Any, corpus: Corpus, size: Size, device: str, console: Console) -> float:
    """Returns the mean loss of the last tenth of the steps, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = get_cosine_schedule_with_warmup(optimizer, size.pretrain_steps // 20, size.pretrain_steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in track(range(size.pretrain_steps), "pretraining", console=console):
        begins = torch.randint(len(corpus.pretraining) - size.window, (size.pretrain_rows, 1), generator=generator)
        batch = corpus.pretraining[begins + torch.arange(size.window)].to(device)
        # With the balancing loss that such models are pretrained with, or a few experts would take all tokens.
        output = model(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append((output.loss - model.router_aux_loss_coef * output.aux_loss).detach())
    return float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())


@torch.no_grad()
def loss_on(model: Any, ids: torch.Tensor, size: Size, device: str) -> float:
    """Nats per token on windows spread evenly over a text."""
    model.eval()
    begins = torch.linspace(0, len(ids) - size.window, size.pretrain_rows).long()[:, None]
    batch = ids[begins + torch.arange(size.window)].to(device)
    return float(model(input_ids=batch, labels=batch, use_cache=False).loss)
