"""``densemixer report`` on runs of the HF Trainer and on what verl writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, tokens
from transformers import Trainer, TrainingArguments

from densemixer_adapters.callback import DenseMixerCallback
from densemixer_adapters.cli import app
from densemixer_adapters.transformers import apply_densemixer

pytest.importorskip("typer", reason="needs typer, which the package requires; install it with pip")
from typer.testing import CliRunner

NEEDS_MATPLOTLIB = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib; run `nox -s transformers`"
)


def report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def train(folder: Path, rate: float, *callbacks: Any, **options: Any) -> Path:
    model = FAMILIES["qwen3_moe"].build()
    apply_densemixer(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=4).tolist()]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        optim="sgd",
        learning_rate=rate,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()
    return folder


@NEEDS_MATPLOTLIB
def test_a_run_in_which_it_works(tmp_path: Path) -> None:
    # The state is that of the newest checkpoint alone.
    train(tmp_path / "run", 0.5, DenseMixerCallback(), save_strategy="steps", save_steps=1, save_only_model=True)
    done = report(tmp_path / "run", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("DenseMixer is at work: ")
    assert (tmp_path / "out" / "densemixer.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "densemixer.html").read_text()
    assert "DenseMixer is at work: " in page
    assert "data:image/png;base64," in page
    assert "checkpoint-2/trainer_state.json" in page


@NEEDS_MATPLOTLIB
def test_a_run_in_which_it_does_nothing(tmp_path: Path) -> None:
    train(tmp_path, 1e-9, DenseMixerCallback(), save_strategy="steps", save_steps=2, save_only_model=True)
    done = report(tmp_path)
    assert done.exit_code == 0, done.output
    assert "0.0 % of the routers' choices changed since the start: DenseMixer is doing nothing here" in done.output
    assert (tmp_path / "densemixer.html").exists()


def test_as_json(tmp_path: Path) -> None:
    train(tmp_path, 0.5, DenseMixerCallback(), save_strategy="steps", save_steps=2, save_only_model=True)
    (found,) = json.loads(report(tmp_path, "--json").output)
    assert found["works"]
    assert found["name"] == ""
    assert [step for step, _ in found["curves"]["router_grad_norm"]] == [1, 2]
    assert found["layers"]["router_grad_norm"].keys() == {"layer_0", "layer_1"}
    assert found["last"]["router_grad_norm"] == found["curves"]["router_grad_norm"][-1][1]
    assert not list(tmp_path.glob("densemixer*"))


def test_a_run_without_metrics_says_how_to_switch_them_on(tmp_path: Path) -> None:
    train(tmp_path, 0.5, save_strategy="steps", save_steps=2, save_only_model=True)
    done = report(tmp_path)
    assert done.exit_code == 1
    assert "densemixer: {metrics: true}" in done.output


@pytest.mark.parametrize("content", [None, "no JSON", '{"log_history": [{"loss": 1}]}', "[]"])
def test_what_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    done = report(tmp_path)
    assert done.exit_code == 2
    assert str(tmp_path) in done.output


def test_verls_file_has_roles(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1}\n')  # of LLaMA-Factory: not this one
    lines = [
        {
            "step": step,
            "data": {
                "actor/densemixer/routing_change": 0.003 * step,
                "actor/densemixer/layer_3/routing_change": 0.0,
                "critic/densemixer/router_grad_share_unselected": 0.3,
                "critic/grad_norm": 1.0,
            },
        }
        for step in (1, 2)
    ]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    actor, critic = json.loads(report(tmp_path, "--json").output)
    assert (actor["name"], actor["works"], critic["name"], critic["works"]) == ("actor", False, "critic", True)
    assert actor["verdict"].startswith(
        "0.6 % of the routers' choices changed since the start: DenseMixer is doing nothing"
    )
    assert actor["layers"] == {"routing_change": {"layer_3": [[1, 0.0], [2, 0.0]]}}


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"densemixer/routing_change": 0.5}
    (tmp_path / "run.jsonl").write_text(json.dumps({"step": 1, "data": data}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = report(tmp_path)
    assert done.exit_code == 2
    assert "pip install matplotlib" in done.output
    assert "DenseMixer is at work" in done.output
