"""How exact the extra gradient of the routers is at each budget, for several numbers of tokens a step.

    make bench-budget ARGS="--help"

Trains a small Mixture-of-Experts model on the source of Python's standard library for a moment, then takes gradients of
the routers' weights on further batches, at fixed weights: conventional, exact, and with each budget. Compared is the
extra gradient alone (that of DenseMixer less the conventional one): the whole would flatter, since most of it is the
same in all.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

LENGTH = 256
ROWS = 16  # sequences of a forward; larger steps accumulate


def main() -> None:
    parser = argparse.ArgumentParser("make bench-budget", description=__doc__.split("\n")[0])
    parser.add_argument("--budgets", nargs="+", type=float, default=[1 / 4, 1 / 8, 1 / 16, 1 / 32])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384, 65536], help="tokens of a step")
    parser.add_argument("--train", type=int, default=400, help="steps of training")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each budget")
    parser.add_argument("--estimator", default="densemixer")
    arguments = parser.parse_args()
    console = Console()
    data = library()
    model = trained(data, arguments.train)

    budgets = sorted(arguments.budgets, reverse=True)
    table = Table("tokens a step", "layer", *(f"1/{1 / budget:g}" for budget in budgets), "conventional")
    for tokens in arguments.tokens:
        batches = list(sample(data, tokens // (LENGTH * ROWS), seed=1))
        conventional = router_gradients(model, batches, DenseMixerConfig("conventional"))
        exact = router_gradients(model, batches, DenseMixerConfig(arguments.estimator))
        errors = []
        for budget in track(budgets, f"{tokens} tokens", console=console):
            draws = [
                router_gradients(model, batches, DenseMixerConfig(arguments.estimator, budget=budget, seed=seed))
                for seed in range(arguments.seeds)
            ]
            errors.append(
                torch.stack([cosines(minus(draw, conventional), minus(exact, conventional)) for draw in draws]).mean(0)
            )
        for layer, (whole, *extra) in enumerate(zip(cosines(conventional, exact), *errors, strict=True)):
            table.add_row(str(tokens), str(layer), *(f"{cosine:.3f}" for cosine in extra), f"{whole:.3f}")
    console.print(table)
    console.print(
        "1/…: cosine between the extra gradient of a router's weight at that budget and the exact one, mean over "
        f"{arguments.seeds} draws.\nconventional: between the whole conventional gradient and the whole exact one."
    )


def library() -> Tensor:
    """The standard library's source, byte by byte."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def sample(data: Tensor, batches: int, seed: int, rows: int = ROWS, length: int = LENGTH) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        starts = torch.randint(len(data) - length, (rows, 1), generator=generator)
        yield data[starts + torch.arange(length)]


def trained(data: Tensor, steps: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        moe_intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in track(list(sample(data, steps, seed=0, length=128)), "training"):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.config.output_router_logits = False  # no auxiliary loss in what is compared
    return model


def router_gradients(model: Qwen3MoeForCausalLM, batches: list[Tensor], config: DenseMixerConfig) -> list[Tensor]:
    model.zero_grad()
    with apply_densemixer(model, config):
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
    return [layer.mlp.gate.weight.grad.flatten().double() for layer in model.model.layers]


def minus(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(one, other, strict=True)]


def cosines(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([cosine_similarity(a, b, dim=0) for a, b in zip(one, other, strict=True)])


if __name__ == "__main__":
    main()
