"""Times training steps: conventional, DenseMixer with several budgets, the original densemixer, and the floor.

    make bench ARGS="--help"

Each setting has a process of its own. They take turns, a step each, so that a machine that gets slower or faster does
so for all. The floor is the time of the additional floating-point operations at the rate of plain matrix products of
the same shape, measured in the same turns.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shapes import SHAPES
from worker import Specification
from worker_process import ORIGINAL, Worker

BUDGETS = {"exact": "1", "budget 1/4": "0.25", "budget 1/8": "0.125", "budget 1/16": "0.0625", "budget 1/32": "0.03125"}
NAMES = {budget: name for name, budget in BUDGETS.items()}


def main() -> None:
    arguments = parse()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    cases = list(all_cases(arguments))
    rows: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=describe(case))
            rows += (found := measure(case, arguments.settings, arguments.rounds))
            append(found, output / "results.csv")  # at once, in case the rest is cut short
            progress.advance(task)
    for table in tables(rows):
        console.print(table)
    (output / "results.md").write_text(markdown(rows))
    draw(rows, output / "results.png")
    console.print(f"on {machine()}; numbers: {output / 'results.csv'}, tables: results.md, plot: results.png")


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        "make bench",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models to take shapes from")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 2048], help="tokens of a step")
    parser.add_argument("--scale", type=int, default=1 if on_gpu else 4, help="divide all widths by this, a power of 2")
    parser.add_argument("--layers", type=int, default=2, help="layers of the whole model")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=[*BUDGETS, "original"],
        default=[*BUDGETS, "original"],
        help="what is compared with conventional training; all of them have their memory at the same time",
    )
    parser.add_argument(
        "--what", nargs="+", choices=["block", "model"], default=["block", "model"], help="a layer, or a model"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each setting")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="of weights and inputs")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/bench"), help="folder for tables, numbers and plot"
    )
    parser.set_defaults(device="cuda" if on_gpu else "cpu")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, and what is done with it; the settings are compared within it."""

    name: str
    specification: Specification


def all_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for what in arguments.what:
        # A whole model is measured for the first of the shapes.
        for name in arguments.shapes if what == "block" else arguments.shapes[:1]:
            for tokens in arguments.tokens:
                for checkpointing in (False,) if what == "block" else (False, True):
                    specification = Specification(
                        setting="conventional",
                        shape=SHAPES[name].scaled(arguments.scale),
                        tokens=tokens,
                        layers=0 if what == "block" else arguments.layers,
                        checkpointing=checkpointing,
                        experts="grouped_mm",
                        dtype=arguments.dtype,
                        device=arguments.device,
                    )
                    yield Case(name, specification)


def describe(case: Case) -> str:
    specification = case.specification
    what = f"model of {specification.layers} layers" if specification.layers else "block"
    return (
        f"{case.name}, {what}{', checkpointed' if specification.checkpointing else ''}, {specification.tokens} tokens"
    )


def measure(case: Case, compared: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each setting."""
    base = case.specification
    fastest = min(("eager", "grouped_mm"), key=lambda experts: once(dataclasses.replace(base, experts=experts)))
    base = dataclasses.replace(base, experts=fastest)
    settings = ["conventional", *(budget for name, budget in BUDGETS.items() if name in compared), "matmul"]
    if "original" in compared and base.shape.in_original and os.environ.get(ORIGINAL):
        settings.append("original")
    with contextlib.ExitStack() as stack:
        workers = {s: stack.enter_context(Worker(dataclasses.replace(base, setting=s))) for s in settings}
        times: dict[str, list[float]] = {setting: [] for setting in settings}
        for _ in range(rounds):
            for setting, worker in workers.items():
                times[setting].append(worker.step())
        found = {setting: worker.finish() for setting, worker in workers.items()}
    median = {setting: statistics.median(values) for setting, values in times.items()}
    rate = 8 * 4 * base.tokens * base.shape.hidden * base.shape.ffn / median["matmul"]
    rows = []
    for setting in settings:
        if setting == "matmul":
            continue
        row: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            **found[setting]["versions"],
            "shape": case.name,
            "hidden": base.shape.hidden,
            "ffn": base.shape.ffn,
            "experts": base.shape.experts,
            "top_k": base.shape.top_k,
            "layers": base.layers,
            "tokens": base.tokens,
            "checkpointing": base.checkpointing,
            "dtype": base.dtype,
            "experts_implementation": fastest if setting != "original" else "",
            "setting": NAMES.get(setting, setting),
            "rounds": rounds,
            "median_s": median[setting],
            "p20_s": quantile(times[setting], 0.2),
            "p80_s": quantile(times[setting], 0.8),
            "over_conventional": median[setting] / median["conventional"],
            "matmul_gflops": rate / 1e9,
            "saved_bytes": found[setting]["saved"],
            "peak_bytes": found[setting]["peak"],
        }
        if "original" in settings:
            row["faster_than_original"] = median["original"] / median[setting]
        if setting in NAMES:
            floor = max(1, base.layers) * base.shape.extra_operations(base.tokens, float(setting)) / rate
            row["floor_over_conventional"] = 1 + floor / median["conventional"]
            # Of each round by itself, where both saw the same machine.
            extra = statistics.median(
                ours - plain for ours, plain in zip(times[setting], times["conventional"], strict=True)
            )
            row["share_of_matmul_rate"] = floor / extra if extra > 0 else ""
        rows.append(row)
    return rows


def once(specification: Specification) -> float:
    with Worker(specification) as worker:
        return worker.step()  # the worker has taken one before, to warm up


def quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{cpu}, {torch.get_num_threads()} threads"


def append(rows: list[dict[str, Any]], path: Path) -> None:
    fields = list(dict.fromkeys(field for row in rows for field in row))
    fresh = not path.exists()
    if not fresh:
        with path.open() as file:
            fields = next(csv.reader(file))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", extrasaction="ignore")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


HEADER = (
    "setting",
    "step, ms",
    "p20 to p80",
    "over conventional",
    "at best",
    "share of matmul rate",
    "faster than original",
    "saved, MiB",
    "peak, MiB",
)


def cells(row: dict[str, Any]) -> list[str]:
    def number(name: str, form: str) -> str:
        return format(row[name], form) if row.get(name, "") != "" else ""

    return [
        row["setting"],
        f"{1e3 * row['median_s']:.1f}",
        f"{1e3 * row['p20_s']:.1f} to {1e3 * row['p80_s']:.1f}",
        number("over_conventional", ".2f"),
        number("floor_over_conventional", ".2f"),
        number("share_of_matmul_rate", ".0%"),
        number("faster_than_original", ".1f"),
        f"{row['saved_bytes'] / 2**20:.1f}",
        f"{row['peak_bytes'] / 2**20:.0f}",
    ]


def groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows that are compared with each other, and what they have in common."""
    common: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        what = f"model of {row['layers']} layers" if row["layers"] else "block"
        title = (
            f"{row['shape']}, {what}{', gradient checkpointing' if row['checkpointing'] else ''}, {row['tokens']} "
            f"tokens; hidden {row['hidden']}, ffn {row['ffn']}, {row['experts']} experts, top-{row['top_k']}, "
            f"{row['dtype']}"
        )
        common.setdefault(title, []).append(row)
    yield from common.items()


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    for title, group in groups(rows):
        table = Table(*HEADER, title=title)
        for row in group:
            table.add_row(*cells(row))
        yield table


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = []
    for title, group in groups(rows):
        lines += [f"**{title}**", "", "| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in group]
        lines.append("")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys((row["shape"], row["layers"], row["checkpointing"]) for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4), squeeze=False, sharey=True)
    for axis, (shape, layers, checkpointing) in zip(axes[0], names, strict=True):
        chosen = [
            row for row in rows if (row["shape"], row["layers"], row["checkpointing"]) == (shape, layers, checkpointing)
        ]
        for setting in dict.fromkeys(row["setting"] for row in chosen):
            points = [(row["tokens"], row["over_conventional"]) for row in chosen if row["setting"] == setting]
            axis.plot(*zip(*points, strict=True), marker="o", label=setting)
        axis.set(
            title=f"{shape}\n{f'{layers} layers' if layers else 'block'}{', checkpointed' if checkpointing else ''}",
            xlabel="tokens a step",
            xscale="log",
            yscale="log",
        )
    axes[0][0].set_ylabel("time of a step over conventional")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
