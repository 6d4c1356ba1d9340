"""The example: the commands of its page for a CPU, and the settings for GPUs, as far as they can be read here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installs import is_installed
from pages import REPOSITORY, blocks

pytestmark = pytest.mark.skipif(is_installed("verl"), reason="the environment of verl has an older Automodel")

EXAMPLE = REPOSITORY / "examples" / "automodel"


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(EXAMPLE / "README.md") if "test_example" in block.comment)
    for file in EXAMPLE.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    for command in block.commands():
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-5000:]
        if "on_cpu" in command:
            text = done.stdout + done.stderr
            assert text.count("DenseMixer is attached to 2 of 2 layers of") == 1
            assert ("budget=0.5" in text) == ("budget" in command)
            assert "step 3 | epoch 0 | loss" in text


def test_the_settings_for_gpus_are_ones_that_automodel_reads() -> None:
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components.config.loader import load_yaml_config

    config = load_yaml_config(EXAMPLE / "sft.yaml")
    assert config.model._target_ == NeMoAutoModelForCausalLM.from_pretrained
    assert config.model.densemixer.to_dict() == {"estimator": "centered", "budget": 0.125}
    assert config.model.backend.instantiate().dispatcher == "torch"
