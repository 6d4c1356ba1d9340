"""The demo as a user runs it, with few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models

DEMO = Path(__file__).parents[2] / "examples" / "demo"
QUICK = ["--batch-size", "4", "--max-length", "128", "--device", "cpu"]


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEMO, *QUICK, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        # One thread, for with such small tensors several only wait for each other.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def numbers(output: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output / "results.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and the printed text of a run that makes its own model and data."""
    output = tmp_path_factory.mktemp("demo")
    done = demo("--steps", "3", "--pretrain-steps", "4", "--output", output)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_prints_a_table_and_what_it_does_not_show(first: tuple[Path, str]) -> None:
    _, text = first
    for row in ("held-out loss before", "norm of the router gradient", "time per step", "peak memory", "Total time"):
        assert row in text
    assert "not whether it helps" in " ".join(text.split())


def test_writes_a_picture(first: tuple[Path, str]) -> None:
    assert (first[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_arms_differ_only_by_densemixer(first: tuple[Path, str]) -> None:
    results = numbers(first[0])
    conventional, densemixer = results["conventional"], results["densemixer"]
    start, start_with = conventional["measurements"][0], densemixer["measurements"][0]
    assert start == start_with
    # The forward is the same, so the first loss is; the first update of the routers is not.
    assert conventional["train_loss"][0] == densemixer["train_loss"][0]
    assert conventional["train_loss"][-1] != densemixer["train_loss"][-1]
    assert all(measurement["share_unselected"] > 0 for measurement in densemixer["measurements"])
    for run in (conventional, densemixer):
        assert len(run["train_loss"]) == len(run["step_seconds"]) == 3
        assert run["measurements"][-1]["step"] == 3
        assert run["peak_mib"] > 100


def test_fine_tunes_a_given_model_on_given_data(first: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = first
    rows = (output / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(rows[:200]))
    done = demo("--model", output / "model", "--data", tmp_path / "data.jsonl", "--steps", "2", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    results = numbers(tmp_path)
    assert results["settings"]["model"] == str(output / "model")
    assert results["densemixer"]["examples"] <= 200
    assert not (tmp_path / "model").exists()


def test_refuses_a_model_without_experts(first: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = first
    tiny_models.build("Qwen3").save_pretrained(tmp_path)
    for file in output.glob("model/*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    done = demo("--model", tmp_path, "--data", output / "data.jsonl", "--output", tmp_path)
    assert done.returncode == 2
    assert re.search("Qwen3ForCausalLM has no Mixture-of-Experts layers", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"can't read the data: .*rows\.jsonl"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r'rows\.jsonl, line 2: "completion" must be'),
        ("\nprompt,completion\n", r"rows\.jsonl, line 2: not JSON"),
    ],
)
def test_names_what_is_wrong_with_the_data(tmp_path: Path, content: str | None, message: str) -> None:
    rows = tmp_path / "rows.jsonl"
    if content is not None:
        rows.write_text(content)
    done = demo("--data", rows, "--output", tmp_path / "output")
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
