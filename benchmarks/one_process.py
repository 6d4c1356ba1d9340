"""Times steps of one layer with and without a budget, in turns, in one process that keeps its memory.

    make bench-large ARGS="--help"

Where every setting has a process of its own, as in `python benchmarks`, a C library's allocator gives the memory of
large tensors back after each use, and the system hands it out anew, page by page. At many tokens that is a large part
of a step on a CPU, and differs from step to step by more than a small budget costs. Here memory once taken stays, as
with torch's own allocator on a GPU. Linux with glibc alone has the switch for that.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from rich.progress import track
from shapes import SHAPES
from worker import Specification, make_step

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def main() -> None:
    parser = argparse.ArgumentParser(
        "make bench-large",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="Qwen3-30B-A3B", help="model to take widths from")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this, a power of 2")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 16), help="as 1/16 or 0.0625")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each setting")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    keep_memory()
    shape = SHAPES[options.shape].scaled(options.scale)
    budget = float(options.budget)

    def step(setting: str) -> Callable[[], Any]:
        return make_step(Specification(setting, shape, options.tokens, 0, False, "grouped_mm", "float32", "cpu"))

    steps = {setting: step(setting) for setting in ("conventional", str(budget), "matmul")}
    rounds = [[measure(run) for run in steps.values()] for _ in track(range(options.rounds + 1), transient=True)][1:]
    # The products that measure the rate, see `make_step`: 8 of [tokens, hidden] with [hidden, 2 ffn].
    share = shape.extra_operations(options.tokens, budget) / (8 * 4 * options.tokens * shape.hidden * shape.ffn)
    print("seconds: conventional, with the budget, by its operations; the second over the third; and what share of the")
    print("second the operating system took, mostly to hand out memory")
    ratios = []
    for (plain, _), (ours, system), (products, _) in rounds:
        best = plain + share * products
        ratios.append((ours / plain, best / plain, ours / best))
        print(f"{plain:8.3f} {ours:8.3f} {best:8.3f} {ours / best:8.3f} {system / ours:8.1%}")
    over, at_best, excess = (statistics.median(values) for values in zip(*ratios, strict=True))
    print(f"medians: {over:.2f} times conventional, {at_best:.2f} by its operations; {excess:.3f} of these")


def keep_memory() -> None:
    """Large tensors from the heap too, and none of it given back."""
    allocator = ctypes.CDLL(None)
    if not (allocator.mallopt(M_MMAP_MAX, 0) and allocator.mallopt(M_TRIM_THRESHOLD, -1)):
        raise SystemExit("one_process.py: this C library's allocator can't be told to keep memory.")


def measure(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and those in which the system worked for us, on all cores."""
    system, start = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    run()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_stime - system


if __name__ == "__main__":
    main()
