"""``densemixer selftest``: green as it is, and red where a copy of the code has a fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from installs import is_installed

from densemixer_adapters.cli.app import SELFTEST_CHECKS
from densemixer_adapters.selftest import CHECKS, spread
from densemixer_adapters.selftest.reference import relative_error

ROOT = Path(__file__).parents[2]
INTERPRETED = Path(__file__).with_name("interpreted_faults.py")


def selftest(*checks: str, code: Path | None = None, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and outcomes, of the installed code or of a copy in a folder."""
    if code is not None:
        environment["PYTHONPATH"] = str(code)
    done = subprocess.run(
        [sys.executable, "-m", "densemixer_adapters.cli", "selftest", *checks, "--json"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=code,  # which comes first on the path
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["outcomes"]


def with_fault(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of both packages in which one line is wrong."""
    shutil.copytree(ROOT / "densemixer_core", folder / "densemixer_core")
    shutil.copytree(ROOT / "adapters" / "densemixer_adapters", folder / "densemixer_adapters")
    text = (folder / file).read_text()
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong))
    return folder


def states(outcomes: list[dict[str, Any]], check: str) -> set[str]:
    return {outcome["state"] for outcome in outcomes if outcome["check"] == check}


def test_green_as_it_is() -> None:
    status, outcomes = selftest()
    assert status == 0, [outcome for outcome in outcomes if outcome["state"] == "failed"]
    for check in ("products", "gradients", "compile", "expert parallelism", "speed"):
        assert "ok" in states(outcomes, check), check
    assert states(outcomes, "kernel") == states(outcomes, "ways") == {"skipped"}
    implementations = {outcome["case"].split(",")[0] for outcome in outcomes if outcome["check"] == "gradients"}
    assert implementations >= {"eager", "grouped_mm"}


@pytest.mark.skipif(not is_installed("triton"), reason="needs triton; run `nox -s transformers`")
def test_a_broken_kernel(tmp_path: Path) -> None:
    """In a line that both kernels have, so both are seen to be compared; green they are in `tests/core`."""
    file, right = "densemixer_core/kernel/triton_kernel.py", "return z * tl.sigmoid(ALPHA * z)"
    broken = with_fault(tmp_path, file, right, f"{right} * 1.05")
    status, outcomes = selftest("kernel", "ways", code=broken, TRITON_INTERPRET="1")
    assert status == 1
    names = {"fused kernel", "all at once", "one by one"}
    compared = [outcome for outcome in outcomes if outcome["check"] == "kernel"]
    assert {outcome["case"].split(", ")[0] for outcome in compared} == names - {"one by one"}
    assert all((outcome["state"] == "failed") == ("silu" in outcome["case"]) for outcome in compared)
    assert {outcome["case"].split(", ")[-1] for outcome in outcomes if outcome["check"] == "ways"} == names


@pytest.mark.skipif(not is_installed("triton"), reason="needs triton; run `nox -s transformers`")
def test_faults_of_each_kind_in_kernels() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout


def test_a_wrong_layout_of_weights(tmp_path: Path) -> None:
    right = "down=weights.down.transpose(1, 2)"
    wrong = "down=weights.down.flip(2).transpose(1, 2)"
    broken = with_fault(tmp_path, "densemixer_core/products.py", right, wrong)
    status, outcomes = selftest("products", code=broken)
    assert status == 1
    assert states(outcomes, "products") == {"ok", "failed"}  # the other orientation is right


def test_a_missing_collective(tmp_path: Path) -> None:
    broken = with_fault(
        tmp_path,
        "densemixer_adapters/collectives.py",
        "    dist.all_to_all_single(received, full, group=group)\n    whole",
        "    received = full\n    whole",
    )
    status, outcomes = selftest("expert parallelism", code=broken)
    assert status == 1
    assert "failed" in states(outcomes, "expert parallelism")


def test_one_process_goes_through_the_collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over NCCL, where a machine has one GPU."""
    made = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return real(*args, **kwargs)

        return collective

    names = ("all_gather_into_tensor", "all_to_all_single")
    for name in names:
        monkeypatch.setattr(dist, name, counted(name))
    threads = torch.get_num_threads()
    try:
        spread._rank(0, 1, str(tmp_path / "one"), "gloo", "cpu")
    finally:
        torch.set_num_threads(threads)
    assert {*made} == {*names}
    assert all(relative_error(*pair) <= 1e-5 for pair in torch.load(tmp_path / "one.0").values())


def test_an_error_in_a_check_is_its_outcome(tmp_path: Path) -> None:
    broken = with_fault(tmp_path, "densemixer_core/products.py", "    if experts.layout.transposed:", "    if nothing:")
    status, outcomes = selftest("products", code=broken)
    assert status == 1
    assert [(outcome["check"], outcome["state"]) for outcome in outcomes] == [("products", "failed")]
    assert "NameError" in outcomes[0]["found"]


def test_the_help_names_the_checks() -> None:
    for name in CHECKS:
        assert re.search(rf"\b{name}\b", SELFTEST_CHECKS)


def test_a_check_that_does_not_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "densemixer_adapters.cli", "selftest", "kernels"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "'kernel'" in done.stderr
