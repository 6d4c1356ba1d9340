"""The examples of TRL, FSDP2 and transformers' parallelism, as their README says to run them without a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import matrix
import pytest
import torch
from installs import is_installed
from packaging.version import Version
from ranks import environment
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    not (is_installed("trl") and is_installed("peft")), reason="needs trl, peft; run `nox -s transformers`"
)


def follow(example: str, folder: Path) -> str:
    """Run the last commands of an example's README in a copy of the examples."""
    here = folder / "examples" / example
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__", "out", "tiny"))
    commands = re.findall(r"```bash\n(.*?)```", (here / "README.md").read_text(), flags=re.DOTALL)[-1]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=here,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_trl(tmp_path: Path) -> None:
    assert "DenseMixer trains the routers of 2 layers" in follow("trl", tmp_path)
    saved = load_file(tmp_path / "examples" / "trl" / "out" / "adapter_model.safetensors")
    second = {name: value for name, value in saved.items() if "mlp.gate" in name and "lora_B" in name}
    assert len(second) == 2
    assert all(value.any() for value in second.values())  # zero at the start


def test_fsdp2(tmp_path: Path) -> None:
    output = follow("fsdp2", tmp_path)
    assert "DenseMixer trains the routers of 2 layers" in output
    assert len(re.findall(r"^step \d: loss \d+\.\d+, gradient norm \d+\.\d+$", output, flags=re.MULTILINE)) == 3
    here = tmp_path / "examples" / "fsdp2"
    before, after = (load_file(here / path / "model.safetensors") for path in ("tiny/model", "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.isfinite(after[name]).all()
    routers = [name for name in before if "mlp.gate.weight" in name]
    assert len(routers) == 2
    assert not any(torch.equal(before[name], after[name]) for name in routers)
    assert json.loads((here / "out" / "config.json").read_text())["model_type"] == "qwen3_moe"


@pytest.mark.skipif(Version(matrix.installed()) < Version("5.23"), reason="transformers spreads experts since 5.23")
def test_transformers_parallel(tmp_path: Path) -> None:
    output = follow("transformers_parallel", tmp_path)
    assert output.count("DenseMixer trains the routers of 2 layers") == 1
    assert output.count("densemixer/router_grad_share_unselected") >= 3
    here = tmp_path / "examples" / "transformers_parallel"
    before, after = (load_file(here / path / "model.safetensors") for path in ("tiny/model", "out"))
    assert before.keys() == after.keys()
    routers = [name for name in before if "mlp.gate.weight" in name]
    assert len(routers) == 2
    assert not any(torch.equal(before[name], after[name]) for name in routers)
    assert json.loads((here / "out" / "config.json").read_text())["model_type"] == "qwen3_moe"
