"""The command `densemixer` on the pages: what stands there is what it takes, and what it prints."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer.main
from pages import COMMANDS, Block
from typer.testing import CliRunner

from densemixer_adapters.cli.app import app

OURS = [block for block in COMMANDS if any(line.startswith("densemixer ") for line in block.commands())]


@pytest.mark.parametrize("block", OURS, ids=str)
def test_the_command_takes_what_stands_on_a_page(block: Block) -> None:
    group: Any = typer.main.get_command(app)
    for line in block.commands():
        if line.startswith("densemixer "):
            name, *arguments = shlex.split(line, comments=True)[1:]
            group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("block", [block for block in OURS if block.language == "console"], ids=str)
def test_output_on_a_page_is_what_the_command_prints(
    block: Block, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(large.parents[1])  # the id of the model is its path there
    (command,) = block.commands()
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert f"$ {command}\n{done.stdout}" == block.text


def test_a_checkpoint_where_a_download_would_have_put_it(large: Path, tmp_path: Path) -> None:
    (block,) = (block for block in COMMANDS if "PATH_TO_CHECKPOINT" in block.text)
    commands = block.text.replace("PATH_TO_CHECKPOINT", str(large))
    subprocess.run(["bash", "-euc", commands], env={**os.environ, "HF_HOME": str(tmp_path)}, check=True)
    config = transformers.AutoConfig.from_pretrained("my/moe", cache_dir=tmp_path / "hub", local_files_only=True)
    assert config.num_experts == 128
