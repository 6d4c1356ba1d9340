"""How exact the extra gradient of the routers is at each budget, without control variates and with them.

    make bench-budget ARGS="--help"

On five kinds of layers: those of two kinds of small models that are trained on the source of Python's standard library
for a moment (one of our own, and the demo's), several of each; one of copies of nearly one network, as up-cycling makes
them; one of random experts; and one of specialists, which do much for inputs that the router sends them and little for
others.

Compared is the extra gradient of a router's weight, what DenseMixer adds to the conventional one, alone: the whole
would flatter, since most of it is the same at each budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from densemixer_adapters.observer import Forward
from densemixer_adapters.transformers import apply_densemixer
from densemixer_adapters.transformers.experts import layout_of
from densemixer_core import DenseMixerConfig, ExpertLayout, ExpertWeights, StackedExperts, expert_dots, straight_through
from densemixer_core.estimators import extra_score_gradient
from densemixer_core.routing import score_gradient_to_logits, score_sensitivity
from densemixer_core.sampling import draw_pairs, offsets, share_of_pairs, typical_size

LENGTH = 256
ROWS = 16  # sequences of a forward; larger steps accumulate
ESTIMATORS = ("densemixer", "centered")
MODELS = 3  # of each kind that is trained: layers of one training differ from those of another
SYNTHETIC = ("copies", "random", "specialists")
PAIRS_PER_PILOT_BEFORE = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        "make bench-budget",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[1 / 8, 1 / 16, 1 / 32, 1 / 64], help="such as 0.125"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[2048], help=f"tokens of a step: multiples of {LENGTH}"
    )
    parser.add_argument("--train", type=int, default=120, help="steps of training of each model")
    parser.add_argument("--seeds", type=int, default=24, help="draws of each budget")
    arguments = parser.parse_args()
    if wrong := [tokens for tokens in arguments.tokens if tokens < 1 or tokens % LENGTH]:
        parser.error(f"--tokens must be multiples of {LENGTH}, the length of a sequence; got {wrong[0]}")
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    console = Console(width=120)
    torch.set_num_threads(1)  # or sums in the training are taken in another order each time
    models = [
        (kind, train(arguments.train, seed))
        for kind, train in (("trained", trained), ("demo", demo_model))
        for seed in range(MODELS)
    ]

    budgets = sorted(arguments.budgets, reverse=True)
    heads = ("tokens a step", "layer", "estimator", *(f"1/{1 / budget:g}" for budget in budgets))
    table, ranges = Table(*heads), Table(*heads)
    for tokens in arguments.tokens:
        layers = {name: [synthetic(name, tokens)] for name in SYNTHETIC}
        for kind, (model, rows) in models:
            for number, layer in enumerate(recorded(model, sample(rows, tokens))):
                layers.setdefault(f"{kind} {number}", []).append(layer)
        found = {
            (name, estimator, budget): [compare(parts, estimator, budget, arguments.seeds) for parts in layers[name]]
            for name in track(layers, f"{tokens} tokens", console=console)
            for estimator in ESTIMATORS
            for budget in budgets
        }
        for name in layers:
            for estimator in ESTIMATORS:
                cells = [" → ".join(map(mean, zip(*found[name, estimator, budget], strict=True))) for budget in budgets]
                table.add_row(str(tokens), name, estimator, *cells)
        for estimator in ESTIMATORS:
            cells = []
            for budget in budgets:
                now = [pair[1] for name in layers if name not in SYNTHETIC for pair in found[name, estimator, budget]]
                cells.append(f"{min(now):.2f} to {max(now):.2f}")
            ranges.add_row(str(tokens), "all that were trained", estimator, *cells)
    console.print(table)
    console.print(
        "Cosine between the extra gradient of a router's weight at that budget and the exact one, without control "
        f"variates → with them; mean over {arguments.seeds} draws, and over {MODELS} models where they were trained."
    )
    console.print(ranges)
    console.print(f"The least and the greatest of the layers of all {2 * MODELS} models, with control variates.")


def mean(cosines: tuple[float, ...]) -> str:
    return f"{sum(cosines) / len(cosines):.3f}"


@dataclasses.dataclass
class Part:
    """What a layer saw in one forward and backward.

    Attributes:
        x: The experts' input, [tokens, hidden].
        g: The gradient of their output y.
        scores: p, [tokens, experts].
        index: The selected experts, [tokens, k].
    """

    experts: StackedExperts
    x: Tensor
    g: Tensor
    y: Tensor
    scores: Tensor
    index: Tensor

    @property
    def factor(self) -> Tensor:
        """c of weights that are renormalised, [tokens, 1]."""
        return 1 / self.scores.gather(1, self.index).sum(1, keepdim=True)

    @functools.cached_property
    def dots(self) -> Tensor:
        return expert_dots(self.x, self.g, self.experts)

    def router_gradient(self, extra: Tensor) -> Tensor:
        return (score_gradient_to_logits(extra, self.scores, "softmax").double().t() @ self.x.double()).flatten()


def compare(parts: list[Part], estimator: str, budget: float, seeds: int) -> tuple[float, float]:
    """The mean cosine over draws, without control variates and with them."""
    truth = torch.stack([exact(part, estimator) for part in parts]).sum(0)
    means = []
    for gradient in (before, now):
        draws = [
            torch.stack([gradient(part, DenseMixerConfig(estimator, budget=budget, seed=seed)) for part in parts])
            for seed in range(seeds)
        ]
        means.append(sum(cosine_similarity(draw.sum(0), truth, dim=0).item() for draw in draws) / seeds)
    return means[0], means[1]


def exact(part: Part, estimator: str) -> Tensor:
    return part.router_gradient(extra_score_gradient(part.dots, part.index, part.factor, mean_output(part, estimator)))


def mean_output(part: Part, estimator: str) -> Tensor | None:
    """⟨g, y⟩, [tokens, 1]; the weights sum to 1."""
    return (part.g * part.y).sum(1, keepdim=True) if estimator == "centered" else None


def now(part: Part, config: DenseMixerConfig) -> Tensor:
    scores = part.scores.clone().requires_grad_()
    weights = scores.gather(1, part.index) * part.factor
    output = straight_through(
        part.y,
        scores,
        x=part.x,
        index=part.index,
        weights=weights,
        experts=part.experts,
        score="softmax",
        renormalised=True,
        config=config,
    )
    (extra,) = torch.autograd.grad(output, scores, part.g)
    return part.router_gradient(extra)


def before(part: Part, config: DenseMixerConfig) -> Tensor:
    """By importance alone: a drawn pair counts 1/π times, another not at all."""
    tokens, experts = part.dots.shape
    count = share_of_pairs(tokens, experts, experts, part.index.shape[1], config.budget)
    norm = part.g.norm(dim=1, keepdim=True)
    sensitivity = score_sensitivity(part.scores, "softmax") * part.factor
    importance = sensitivity.scatter(1, part.index, 0) * norm
    pilots = count // PAIRS_PER_PILOT_BEFORE
    offset, next_offset = offsets(importance, config.seed)
    pairs = draw_pairs(importance / importance.sum(0).clamp(min=1e-30), pilots, offset)
    size = (part.dots / norm).nan_to_num(0, 0, 0).t().flatten()[pairs.place]
    pairs = draw_pairs(importance * typical_size(size, pairs, tokens), count - pilots, next_offset)
    factors = torch.zeros(experts * tokens, dtype=torch.float64).index_add_(0, pairs.place, pairs.factor)
    extra = extra_score_gradient(part.dots, part.index, part.factor, mean_output(part, config.estimator))
    return part.router_gradient(extra * factors.view(experts, tokens).t())


def synthetic(kind: str, tokens: int, hidden: int = 32, ffn: int = 16, experts: int = 16, k: int = 2) -> list[Part]:
    """A layer whose output should be a function that it wasn't trained for, which makes g."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 0.3) -> Tensor:
        return std * torch.randn(*shape, generator=random, dtype=torch.float64)

    router, up, down = normal(experts, hidden), normal(experts, 2 * ffn, hidden), normal(experts, hidden, ffn)
    if kind == "copies":
        up, down = up[:1] + 0.1 * up, down[:1] + 0.1 * down
    elif kind == "specialists":  # whose gates open in the direction that the router looks for
        towards = router / router.norm(dim=1, keepdim=True)
        up[:, :ffn] = 1.5 * towards.unsqueeze(1) + normal(experts, ffn, hidden, std=0.1)
    x, target = normal(tokens, hidden, std=1), normal(hidden, hidden)
    scores = (x @ router.T).softmax(1)
    top, index = scores.topk(k, 1)
    gates, ups = torch.einsum("th,ewh->tew", x, up).chunk(2, -1)
    outputs = torch.einsum("tef,ehf->teh", silu(gates) * ups, down)
    y = (outputs.gather(1, index.unsqueeze(2).expand(-1, -1, hidden)) * (top / top.sum(1, True)).unsqueeze(2)).sum(1)
    stacked = StackedExperts(ExpertWeights(up, down), ExpertLayout(gated))
    return [Part(stacked, x, 2 * (y - torch.tanh(x @ target)), y, scores, index)]


def gated(up: Tensor) -> Tensor:
    gate, up = up.chunk(2, -1)
    return silu(gate) * up


def recorded(model: Any, batches: Iterator[Tensor]) -> list[list[Part]]:
    """What each layer sees in each of these batches."""
    layers: list[list[Part]] = [[] for _ in model.model.layers]
    with apply_densemixer(model, DenseMixerConfig("conventional")) as handle:
        for layer, parts in zip(handle.layers, layers, strict=True):
            experts = layer.experts
            weights = ExpertWeights(experts.gate_up_proj.detach(), experts.down_proj.detach())
            stacked = StackedExperts(weights, layout_of(experts))

            def observe(
                forward: Forward, output: Tensor, _: Tensor | None, parts: list[Part] = parts, experts: Any = stacked
            ) -> tuple[Tensor, None]:
                x, logits = (tensor.detach().flatten(0, -2) for tensor in (forward.x, forward.router_output))
                scores = logits if forward.probabilities else logits.softmax(1, dtype=torch.float32)
                y = output.detach().view(x.shape)
                output.register_hook(
                    lambda g: parts.append(Part(experts, x, g.reshape(x.shape), y, scores, forward.index))
                )
                return output, None

            layer.observer = observe
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
    return layers


def library() -> Tensor:
    """The standard library's source, byte by byte."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def sample(data: Tensor, tokens: int, seed: int = 1, length: int = LENGTH) -> Iterator[Tensor]:
    """As many tokens, in batches of no more than `ROWS` sequences."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.ones(tokens // length).split(ROWS):
        starts = torch.randint(len(data) - length, (len(rows), 1), generator=generator)
        yield data[starts + torch.arange(length)]


def trained(steps: int, seed: int) -> tuple[Qwen3MoeForCausalLM, Tensor]:
    """A small model, and the library in its tokens."""
    data = library()
    torch.manual_seed(seed)
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
    for batch in track(list(sample(data, steps * 2048, seed=seed + 100, length=128)), "training"):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.config.output_router_logits = False  # no auxiliary loss in what is compared
    return model, data


def demo_model(steps: int, seed: int) -> tuple[Any, Tensor]:
    """The demo's start model, and the library in its tokens."""
    import model as start
    from data import library_files
    from settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(folder, "densemixer", 0, steps, 4, 256, 5e-4, seed, "cpu")
        start.pretrain(library_files(), settings)
        model, tokenizer = start.load(settings)
    torch.use_deterministic_algorithms(False)
    text = "".join(file.read_text(encoding="utf-8") for file in library_files()[:200])
    return model, torch.tensor(tokenizer(text)["input_ids"])


if __name__ == "__main__":
    main()
