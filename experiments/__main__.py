"""Does DenseMixer help a small Mixture-of-Experts model? With seeds, tuning and error bars.

Pretrains small models on the source of Python's standard library and trains them further from there, in several ways.
Every arm has the same data in the same order, the same learning rates to choose from, and the same seeds. Nothing is
downloaded. The parts:

post-training  five ways, on two tasks: writing docstrings, by supervised fine-tuning, and completing statements so that
               a verifier accepts them, by reinforcement learning
router-only    nothing but routers is trained, on text of another kind
router-rate    docstrings again, with ten times the learning rate for routers
up-cycled      a start model whose experts are copies of a dense network, and whose router is random
preflight      what `densemixer preflight` says of the settings of these three, beside what they showed

The three are decided beforehand, in experiments/PLAN.md. A run that has finished is kept in the output folder, and
isn't done again: what was interrupted goes on where it stopped.

`make experiment` runs it with `examples/demo` in PYTHONPATH: data, batches and the measure of routing are the demo's.
The folders: `start`, the text and the model that all begins with; `post_training` and `planned`, the experiments;
`quality`, what `gradient_quality.py` measures; `common`, what they need.
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
from planned import comparisons
from planned import figures as planned_figures
from planned import schedule as planned_schedule
from planned import tables as planned_tables
from planned.foresight import compare_with_training
from planned.parts import PARTS as PLANNED_PARTS
from planned.sizes import PLANNED
from post_training import figures, tables
from post_training.arms import ARMS, BASELINE
from post_training.schedule import run_all
from post_training.training import Result
from rich.console import Console
from start import model as start

POST_TRAINING, PREFLIGHT = "post-training", "preflight"


def main() -> None:
    began = time.perf_counter()
    options = parse()
    console = console_for()
    set_determinism(options.device)
    if POST_TRAINING in options.part:
        post_train(options, console)
    if planned := [part for part in PLANNED_PARTS if part in options.part]:
        with planned_schedule.worker_pool(options.jobs) as pool:
            planned_schedule.run_parts(planned, PLANNED[options.size], options.output, pool, console)
        report_planned(options, console)
    if PREFLIGHT in options.part:
        size, folder = PLANNED[options.size], options.output
        foresaw = compare_with_training(planned_schedule.kept_parts(size, folder), size, folder, console)
        _write(foresaw, folder / "preflight.md", console)
    minutes = (time.perf_counter() - began) / 60
    console.print(f"\n{hardware(options.device)}\nTotal time: {minutes:.0f} min; {options.output}")


def post_train(options: argparse.Namespace, console: Console) -> None:
    """The part of that name."""
    began = time.perf_counter()
    size, folder = SIZES[options.size], options.output
    start.prepare(size, folder / "start", options.device, console)
    seeds = options.seeds or size.seeds
    results = run_all(size, seeds, options.arms, folder, options.device, options.jobs, console)
    tables.write_csv(results, folder / "results.csv")
    write_json(results, folder / "results.json", options, time.perf_counter() - began)
    figures.draw(results, folder)
    made = (tables.results_table(results), tables.routing_table(results), tables.tuning_table(results))
    _write("\n\n".join(made) + "\n", folder / "results.md", console)


def report_planned(options: argparse.Namespace, console: Console) -> None:
    """All of the parts that were decided beforehand that is kept, whichever of them has just been run."""
    parts = planned_schedule.kept_parts(PLANNED[options.size], options.output)
    compared = comparisons.compare(parts)
    planned_figures.draw(compared, options.output / "planned.png")
    _write(planned_tables.whole(parts, compared), options.output / "planned.md", console)


def _write(text: str, path: Path, console: Console) -> None:
    path.write_text(text, encoding="utf-8")
    console.print(text, markup=False, soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parts = [POST_TRAINING, *PLANNED_PARTS, PREFLIGHT]
    parser.add_argument("--part", nargs="+", choices=parts, help="(default: all that the size has)")
    parser.add_argument("--seeds", type=int, help="runs of each arm in post-training (default: as the size says)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="runs at the same time, of one thread each (default: one a core); on a GPU 1 to begin with",
    )
    among = f"of post-training; among them must be {BASELINE!r}"
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help=among)
    options = parser.parse_args()
    planned = options.size in PLANNED and options.device == "cpu"
    options.part = options.part or (parts if planned else [POST_TRAINING])
    if not planned and options.part != [POST_TRAINING]:
        parser.error(f"argument --part: of this size and device there is {POST_TRAINING!r} alone")
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
