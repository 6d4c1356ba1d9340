"""Training routers alone, by the lines of its page, under transformers, TRL and PEFT."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from installs import is_installed
from pages import REPOSITORY, blocks
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not (is_installed("trl") and is_installed("peft")), reason="needs trl, peft; run `nox -s transformers`"
)

LOADED, ADAPTED, _ = (b.text for b in blocks(REPOSITORY / "docs" / "router-only.md") if b.language == "python")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    runpy.run_path(str(REPOSITORY / "examples" / "llamafactory" / "make_tiny.py"))["main"](folder)
    return folder


def trained(tiny: Path, output: Path, *lines: str) -> tuple[dict[str, Tensor], Any]:
    """What TRL saves after two steps with a model that the page's lines have made, and the handle."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    names: dict[str, Any] = {}
    for line in lines:
        exec(line.replace("Qwen/Qwen3-30B-A3B-Instruct-2507", str(tiny / "model")), names)
    options = SFTConfig(
        str(output), max_steps=2, learning_rate=0.01, use_cpu=True, bf16=False, report_to="none", save_only_model=True
    )
    data = load_dataset("json", data_files=str(tiny / "data" / "chat.json"), cache_dir=str(output / "cache"))["train"]
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    trainer = SFTTrainer(names["model"], args=options, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return load_file(next(output.glob("*model.safetensors"))), names["handle"]


def test_a_frozen_model(tiny: Path, tmp_path: Path) -> None:
    after, handle = trained(tiny, tmp_path, LOADED)
    before = load_file(tiny / "model" / "model.safetensors")
    moved = {name for name, weight in after.items() if not torch.equal(weight.float(), before[name].float())}
    assert moved == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert {layer.config.estimator for layer in handle.layers} == {"centered"}


def test_an_adapter(tiny: Path, tmp_path: Path) -> None:
    """PEFT keeps the routers alone, and they are those that training the frozen model gives."""
    whole, _ = trained(tiny, tmp_path / "whole", LOADED)
    adapter, handle = trained(tiny, tmp_path / "adapter", LOADED, ADAPTED)
    assert sorted(adapter) == [f"base_model.model.model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]
    for name, weight in adapter.items():
        torch.testing.assert_close(weight.float(), whole[name.removeprefix("base_model.model.")].float())
    assert not any(layer.router_is_frozen for layer in handle.layers)
