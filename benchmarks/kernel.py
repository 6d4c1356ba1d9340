"""Times the ways to evaluate all experts: the fused kernel, all experts at once, and one by one; and a large product.

Usage, on a machine with a CUDA GPU, torch, Triton and this package: python benchmarks/kernel.py [--help].

The operations are those of one layer's extra backward pass: 6·hidden·ffn for each token and expert. The ways and the
large product take turns. Prints a table and appends its rows to a CSV. A way that raises or gives other numbers doesn't
stop the rest, and makes the exit status 1. With TRITON_INTERPRET=1 it runs on a CPU, slowly, to show that it runs; its
times mean nothing there.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from densemixer_core import Activation, ExpertLayout, ExpertWeights, StackedExperts
from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.ways import ONE_BY_ONE, TOLERANCE, ways

SILU = Activation("silu", "concatenated")
LARGE = "large product"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds, operations a second over those of the large product, and what is wrong."""

    tokens: int
    what: str
    median_ms: float = math.nan
    p20_ms: float = math.nan
    p80_ms: float = math.nan
    tflops: float = math.nan
    of_matmul_rate: float = math.nan
    error: float = math.nan
    failed: str = ""


def milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def measure(options: argparse.Namespace, tokens: int, device: str) -> list[Row]:
    dtype = DTYPES[options.dtype]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    hidden, ffn, experts, side = options.hidden, options.ffn, options.experts, options.matmul
    x, g = random(tokens, hidden), random(tokens, hidden)
    up = random(experts, 2 * ffn, hidden, scale=hidden**-0.5)
    down = random(experts, hidden, ffn, scale=ffn**-0.5)
    experts_ = StackedExperts(ExpertWeights(up, down), ExpertLayout(SILU, formula=SILU))
    found = {name: lambda way=way: way(x, g) for name, way in ways(experts_, options.workspace_mb << 20).items()}
    a, b = random(side, side), random(side, side)

    runs: dict[str, Callable[[], Tensor]] = {LARGE: lambda: a @ b, **found}
    operations = dict.fromkeys(found, 6.0 * tokens * experts * hidden * ffn) | {LARGE: 2.0 * side**3}
    outputs, failed = outputs_of(runs)
    errors = {LARGE: 0.0} if LARGE in outputs else {}
    for name in found.keys() & outputs.keys():
        if ONE_BY_ONE not in outputs:
            failed[name] = f"can't be compared: {ONE_BY_ONE} doesn't run"
            continue
        errors[name] = error_of(outputs[name], outputs[ONE_BY_ONE])
        if not errors[name] <= TOLERANCE[dtype]:  # NaN is wrong, too
            failed[name] = f"is off by {errors[name]:.1e}, where rounding is at most {TOLERANCE[dtype]:.0e}"
    times, stopped = times_of({name: runs[name] for name in outputs}, options.repetitions, device)
    failed |= stopped
    rate = operations[LARGE] / statistics.median(times.get(LARGE, [math.nan]))
    rows = []
    for name in runs:
        row = Row(tokens, name, error=errors.get(name, math.nan), failed=failed.get(name, ""))
        if name in times:
            low, _, _, high = statistics.quantiles(times[name], n=5, method="inclusive")
            median = statistics.median(times[name])
            speed = operations[name] / median
            row = dataclasses.replace(
                row, median_ms=median, p20_ms=low, p80_ms=high, tflops=speed / 1e9, of_matmul_rate=speed / rate
            )
        rows.append(row)
    return rows


def times_of(
    runs: dict[str, Callable[[], Tensor]], repetitions: int, device: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each repetition, in turns; and why some stopped before the last, which have no times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed = {}
    for repetition in range(repetitions + 2):
        for name in list(times):
            try:
                elapsed = milliseconds(runs[name], device)
            except Exception as error:  # memory, for one, that others have taken since
                traceback.print_exc()
                failed[name] = reason(error)
                del times[name]
                continue
            if repetition >= 2:  # warm by then
                times[name].append(elapsed)
    return times, failed


def outputs_of(runs: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of those that run, which tunes them too; and why the others don't."""
    outputs, failed = {}, {}
    for name, run in runs.items():
        try:
            outputs[name] = run()
        except Exception as error:  # of Triton's compiler, a C compiler, the driver, memory: there are many kinds
            traceback.print_exc()
            failed[name] = reason(error)
    return outputs, failed


def reason(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def error_of(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--hidden", type=int, default=2048, help="of Qwen3-30B-A3B, as the next two")
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--matmul", type=int, default=8192, help="rows and columns of the large product")
    parser.add_argument("--workspace-mb", type=int, default=256, help="the option of that name")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=Path("outputs/benchmarks/kernel.csv"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not INTERPRETED:
        sys.exit("benchmarks/kernel.py needs a CUDA GPU: torch.cuda.is_available() is False.")
    import triton

    machine = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs, in the interpreter"
    about = {
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
        "machine": machine,
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{name: getattr(options, name) for name in ("hidden", "ffn", "experts", "dtype")},
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'tokens':>7}  {'':13} {'median ms':>10} {'p20':>9} {'p80':>9} {'TFLOP/s':>9} {'of rate':>8}  error")
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    new = not options.csv.exists()
    failures = []
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*about, *(field.name for field in dataclasses.fields(Row))])
        if new:
            writer.writeheader()
        for tokens in options.tokens:
            try:
                rows = measure(options, tokens, device)
            except Exception as error:  # the next number of tokens may fit into memory
                traceback.print_exc()
                rows = [Row(tokens, "all", failed=reason(error))]
            for row in rows:
                writer.writerow(about | dataclasses.asdict(row))
                print(
                    f"{row.tokens:7}  {row.what:13} {row.median_ms:10.3f} {row.p20_ms:9.3f} {row.p80_ms:9.3f} "
                    f"{row.tflops:9.2f} {row.of_matmul_rate:8.1%}  {row.error:.1e}  {row.failed}"
                )
                if row.failed:
                    failures.append(f"{row.tokens} tokens, {row.what}: {row.failed}")
            file.flush()  # in case the rest is cut short
    print(f"Appended to {options.csv}. error: ‖way − one by one‖ / ‖one by one‖.")
    if failures:
        sys.exit("; ".join(failures))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
