"""The command `densemixer` on the pages: what stands there is what it takes, and what it prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer.main
from pages import COMMANDS, REPOSITORY, Block
from test_inspection import LARGE
from typer.testing import CliRunner

from densemixer_adapters.cli import app

OURS = [block for block in COMMANDS if any(line.startswith("densemixer ") for line in block.commands())]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the id of the pages' model is a path."""
    folder = tmp_path_factory.mktemp("hub")
    transformers.Qwen3MoeConfig(**LARGE).save_pretrained(folder / "Qwen" / "Qwen3-30B-A3B")
    return folder


@pytest.mark.parametrize("block", OURS, ids=str)
def test_the_command_takes_what_stands_on_a_page(block: Block) -> None:
    group: Any = typer.main.get_command(app)
    for line in block.commands():
        if line.startswith("densemixer "):
            name, *arguments = shlex.split(line, comments=True)[1:]
            group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("block", [block for block in OURS if block.language == "console"], ids=str)
def test_output_on_a_page_is_what_the_command_prints(block: Block, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    (command,) = block.commands()
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert f"$ {command}\n{done.stdout}" == block.text


def test_a_checkpoint_where_a_download_would_have_put_it(hub: Path, tmp_path: Path) -> None:
    (block,) = (block for block in COMMANDS if "PATH_TO_CHECKPOINT" in block.text)
    commands = block.text.replace("PATH_TO_CHECKPOINT", str(hub / "Qwen" / "Qwen3-30B-A3B"))
    subprocess.run(["bash", "-euc", commands], env={**os.environ, "HF_HOME": str(tmp_path)}, check=True)
    config = transformers.AutoConfig.from_pretrained("my/moe", cache_dir=tmp_path / "hub", local_files_only=True)
    assert config.num_experts == LARGE["num_experts"]


def test_the_costs_of_the_readme_are_those_of_the_command(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)

    def cost(tokens: int) -> list[dict[str, Any]]:
        arguments = ["cost", "Qwen/Qwen3-30B-A3B", "--seq-len", str(tokens), "--json"]
        settings: list[dict[str, Any]] = json.loads(CliRunner().invoke(app, arguments).stdout)["settings"]
        return settings

    rows = [
        f"| {short['extra'] / 1e9:.4g} | {short['step_time']:.2f}x | {short['step_time_checkpointed']:.2f}x "
        f"| {long['step_time']:.2f}x |"
        for short, long in zip(cost(4096), cost(40960), strict=True)
    ]
    assert re.findall(r"^\| (?:1|1/\d+) (\| .*)$", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE) == rows
