"""Tests on several processes: how a test starts a script that has them, how these meet, and what each of them found."""

from __future__ import annotations

import datetime
import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from device import DEVICE

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")


def once(compute: Callable[Arguments, Found]) -> Callable[Arguments, Found]:
    """Like `functools.cache`, and what fails isn't tried again: all tests that ask for it have the same error."""
    outcomes: dict[Any, Any] = {}

    @functools.wraps(compute)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Found:
        key = args, tuple(kwargs.items())
        if key not in outcomes:
            try:
                outcomes[key] = compute(*args, **kwargs), None
            except Exception as error:
                outcomes[key] = None, error
        found, error = outcomes[key]
        if error is not None:
            raise error
        return found

    return run


def run_script(script: Path, report: Path, *arguments: str, ranks: int = 0, **settings: str) -> Any:
    """What a script of the tests writes to ``report``, its first argument, as JSON.

    Args:
        script: Runs with the modules that the running tests can import.
        report: Where it writes.
        arguments: What follows.
        ranks: How many processes torchrun starts of it; without torchrun it is one.
        settings: Of its environment.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(report), *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(report.read_text())


def environment(**settings: str) -> dict[str, str]:
    """Of a process that has no network, and a GPU only where the tests run on one, with some settings more."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # DeepSpeed compiles its CPU communication with ninja, which lies beside the interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **({"CUDA_VISIBLE_DEVICES": ""} if DEVICE == "cpu" else {}),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **settings,
    }


def join(rank: int, processes: int, store: str, seconds: int = 60) -> None:
    """Make this process one of the gloo group that meets at the file ``store``."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=seconds),
    )


def of_all_ranks(result: Any) -> list[Any]:
    """What each rank has, in their order. Collective."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    return results


def found_by_all(checks: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """What each check found on each rank, or the error that stopped it there. Collective."""
    found = {}
    for name, check in checks.items():
        try:
            result = check()
        except Exception:
            result = {"failed": traceback.format_exc()}
        found[name] = of_all_ranks(result)
    return found


def add_to(report: Path, results: dict[str, Any]) -> None:
    """Write results to what a file has already, on the first rank."""
    if dist.get_rank() == 0:
        before = json.loads(report.read_text()) if report.exists() else {}
        report.write_text(json.dumps(before | results))
