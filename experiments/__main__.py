"""Does DenseMixer help a small Mixture-of-Experts model in post-training? With seeds, tuning and error bars.

Pretrains a small model on the source of Python's standard library, then post-trains it from there in five ways (frozen
router, conventional, densemixer, centered, densemixer with a budget of 1/8) on two tasks: writing docstrings, by
supervised fine-tuning, and completing statements so that a verifier accepts them, by reinforcement learning. Every arm
has the same data in the same order, the same learning rates to choose from, and the same seeds. Nothing is downloaded.

`make experiment` runs it with `examples/demo` in PYTHONPATH: data, batches and the measure of routing are the demo's.
The folders: `start`, the text and the model that all begins with; `post_training`, this experiment; `quality`, what
`gradient_quality.py` measures; `common`, what both need.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

from common.options import add_common_options, console_for, environment, hardware, set_determinism
from common.sizes import SIZES
from post_training import figures, tables
from post_training.arms import ARMS, BASELINE
from post_training.schedule import run_all
from post_training.training import Result
from start import model as start

PARTS = {"results": tables.results_table, "routing": tables.routing_table, "tuning": tables.tuning_table}


def main() -> None:
    began = time.perf_counter()
    options = parse()
    console = console_for()
    size = SIZES[options.size]
    set_determinism(options.device)
    folder: Path = options.output
    start.prepare(size, folder / "start", options.device, console)
    seeds = options.seeds or size.seeds
    results = run_all(size, seeds, options.arms, folder / "start", options.device, options.jobs, console)

    tables.write_csv(results, folder / "results.csv")
    write_json(results, folder / "results.json", options, time.perf_counter() - began)
    figures.draw(results, folder)
    text = "\n\n".join(table(results) for table in PARTS.values())
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"\n{hardware(options.device)}\nTotal time: {(time.perf_counter() - began) / 60:.0f} min; {folder}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: as the size says)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="runs at the same time, of one thread each (default: one a core); on a GPU 1 to begin with",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help=f"among them must be {BASELINE!r}"
    )
    options = parser.parse_args()
    if BASELINE not in options.arms:
        parser.error(f"argument --arms: {BASELINE!r} is what the others are compared with")
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"argument --seeds: confidence intervals take at least 2, got {options.seeds}")
    return options


def write_json(results: list[Result], path: Path, options: argparse.Namespace, seconds: float) -> None:
    """Every run with its curve, and what it ran on."""
    numbers = {
        "size": {"name": options.size, **dataclasses.asdict(SIZES[options.size])},
        "environment": environment(options.device),
        "seconds": seconds,
        "runs": [dataclasses.asdict(result) for result in results],
    }
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
