"""`benchmarks/kernel.py` where a way to evaluate experts is wrong or doesn't run: it times the rest, and fails."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from installs import is_installed

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernel.py"
SIZES = ("--hidden=24", "--ffn=20", "--experts=2", "--matmul=64", "--repetitions=2", "--dtype=float32")
WAYS = ("large product", "fused kernel", "all at once", "one by one")
# By the number of tokens: what the fused kernel does with them, and what is to be said of it.
FAULTS = {
    "21": ("calls.append(0); assert len(calls) < 4, 'no room'; return right(x, *rest)", "AssertionError: no room"),
    "20": ("raise RuntimeError('PTX is too\\nnew')", "RuntimeError: PTX is too new"),
    "19": ("return right(x, *rest) * float('nan')", "is off by nan, where rounding is at most 4e-03"),
    "18": ("return right(x, *rest) * 2", "is off by 1.0e+00, where rounding is at most 4e-03"),
    "17": ("return right(x, *rest)", ""),
}


@pytest.mark.skipif(not is_installed("triton"), reason="needs triton; run `nox -s transformers`")
def test_what_is_wrong_or_does_not_run(tmp_path: Path) -> None:
    faults = "\n".join(f"    if len(x) == {tokens}: {fault}" for tokens, (fault, _) in FAULTS.items())
    program = tmp_path / "program.py"
    program.write_text(
        f"import runpy\nfrom densemixer_core.kernel import triton_kernel\ncalls = []\nright = triton_kernel.launch\n"
        f"def launch(x, *rest):\n{faults}\ntriton_kernel.launch = launch\n"
        f"runpy.run_path({str(BENCHMARK)!r}, run_name='__main__')\n"
    )
    path = tmp_path / "kernel.csv"
    done = subprocess.run(
        [sys.executable, program, *SIZES, f"--csv={path}", "--tokens", *FAULTS],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=570,
    )
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["tokens"], row["what"], row["failed"]) for row in rows] == [
        (tokens, way, said if way == "fused kernel" else "") for tokens, (_, said) in FAULTS.items() for way in WAYS
    ]
    untimed = [(row["tokens"], row["what"]) for row in rows if not float(row["median_ms"]) > 0]
    assert untimed == [("21", "fused kernel"), ("20", "fused kernel")]
    assert done.returncode == 1
    last = "; ".join(f"{tokens} tokens, fused kernel: {said}" for tokens, (_, said) in FAULTS.items() if said)
    assert done.stderr.splitlines()[-1] == last
