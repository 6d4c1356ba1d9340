"""What is the gradient worth that DenseMixer gives a router? Compared with the effect of changing the routing itself.

On a frozen small Mixture-of-Experts, for tokens of text that it has never seen, each unselected expert is forced into
one token's routing in one layer, and the loss is measured by a forward pass. Each estimator's gradient predicts that
change. No training is involved beyond the pretraining of the model: that is the start model of `make experiment`, and
is made if it isn't there. In float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from common.options import add_common_options, console_for, environment, set_determinism
from common.sizes import SIZES, Size
from quality import report
from quality.forcing import effects, estimate, in_float64, predictions
from quality.pairs import EFFECTS, Token, token
from rich.console import Console
from rich.progress import track
from start import model as start
from torch import Tensor

from densemixer_core.routing import score_gradient_to_logits


def main() -> None:
    began = time.perf_counter()
    options = parse()
    console = console_for()
    size = SIZES[options.size]
    set_determinism(options.device)
    folder: Path = options.output
    start.prepare(size, folder / "start", options.device, console)
    ids = held_out_sequences(start.load_corpus(folder / "start").unseen, size)
    model = in_float64(start.load_model(folder / "start", options.device))
    layers = measure(model, ids.to(options.device), size, console)
    (folder / "gradient_quality.pickle").write_bytes(pickle.dumps(layers))  # all pairs, for other questions

    numbers, text = report.numbers(layers), report.tables(layers)
    facts = {"environment": environment(options.device), "size": dataclasses.asdict(size), "measures": numbers}
    (folder / "gradient_quality.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "gradient_quality.md").write_text(text + "\n", encoding="utf-8")
    report.draw(layers, folder / "gradient_quality.png")
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"\nTotal time: {(time.perf_counter() - began) / 60:.1f} min; {folder}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gradient-quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    return parser.parse_args()


def held_out_sequences(unseen: Tensor, size: Size) -> Tensor:
    """Windows spread evenly over the files of the test split, [sequences, tokens]."""
    begins = torch.linspace(0, len(unseen) - size.quality_length, size.quality_sequences).long()[:, None]
    return unseen[begins + torch.arange(size.quality_length)]


def measure(model: Any, ids: Tensor, size: Size, console: Console) -> list[list[Token]]:
    """By layer, predictions and measurements for random tokens of every sequence; the same tokens in every layer."""
    estimates = estimate(model, ids)
    modules = [layer.mlp.experts for layer in model.model.layers]
    generator = torch.Generator().manual_seed(0)
    # The last token's output predicts nothing.
    places = [torch.randperm(size.quality_length - 1, generator=generator)[: size.quality_tokens].tolist() for _ in ids]
    found: list[list[Token]] = [[] for _ in modules]
    for sequence in track(range(len(ids)), "forcing experts", console=console):
        for place in places[sequence]:
            for layer, experts in enumerate(modules):
                here = estimates[layer]
                scores, index = here.scores[sequence, place], here.index[sequence, place]
                measured = effects(model, experts, ids[sequence], scores, index, place, tuple(EFFECTS))
                predicted = {name: predictions(here, sequence, place, name) for name in here.gradients}
                # The score gradient that the measurements amount to: the secant for those who join.
                gradients = {name: gradient[sequence, place] for name, gradient in here.gradients.items()}
                secant = gradients["conventional"].clone()
                secant[measured.experts] = measured.added[1.0] / scores[measured.experts]
                logits = {
                    name: score_gradient_to_logits(gradient[None], scores[None], "softmax")[0]
                    for name, gradient in (gradients | {"measured": secant}).items()
                }
                found[layer].append(token(sequence, measured, predicted, logits, here.x[sequence, place]))
    return found


if __name__ == "__main__":
    main()
