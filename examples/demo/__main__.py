"""Fine-tune a small Mixture-of-Experts twice, conventionally and with DenseMixer, and compare.

Without options it trains a small model on the source of Python's standard library for a moment, then fine-tunes it to
write docstrings; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from compare import compare
from data import library_examples, library_files, read_examples, write_examples
from rich.console import Console
from settings import DemoError, Settings


def main() -> int:
    started = time.perf_counter()
    options = parse()
    console = Console(highlight=False)
    settings = Settings(
        model=options.model or str(options.output / "model"),
        estimator=options.estimator,
        steps=options.steps,
        pretrain_steps=0 if options.model else options.pretrain_steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        learning_rate=options.learning_rate or (1e-5 if options.model else 5e-4),
        seed=options.seed,
        device=options.device,
    )
    try:
        examples = read_examples(options.data) if options.data else library_examples(library_files())
        options.output.mkdir(parents=True, exist_ok=True)
        if not options.data:
            write_examples(examples, options.output / "data.jsonl")
        compare(examples, settings, options.output, console)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"\nTotal time: {time.perf_counter() - started:.0f} s")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python examples/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help="fine-tune this checkpoint, a folder or a hub id, in float32, instead of the small model; it must be a "
        "Mixture-of-Experts that transformers can load",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='train on these rows, one JSON object per line: {"prompt": "...", "completion": "..."}; the loss is that '
        'of the completion. Rows with equal "source" (optional; by default the prompt) are held out together. '
        "Rows longer than --max-length are left out",
    )
    parser.add_argument(
        "--estimator",
        choices=["densemixer", "centered"],
        default="densemixer",
        help="what unselected experts teach the router (default: %(default)s)",
    )
    parser.add_argument("--steps", type=positive, default=120, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument(
        "--pretrain-steps",
        type=positive,
        default=160,
        help="steps that make the small model, unless --model is given (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="examples per step (default: %(default)s)")
    parser.add_argument("--max-length", type=positive, default=256, help="tokens per example (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, help="peak learning rate (default: 5e-4 for the small model, 1e-5 with --model)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the weights, the split and the order; on a CPU the losses repeat exactly (default: %(default)s)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if there")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/demo"),
        metavar="FOLDER",
        help="where results.json, curves.png, the data and the small model go (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.learning_rate is not None and options.learning_rate <= 0:
        parser.error(f"argument --learning-rate: must be positive, got {options.learning_rate}")
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
