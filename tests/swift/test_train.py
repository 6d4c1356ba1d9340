"""``swift sft`` and ``swift rlhf`` under DENSEMIXER_ENABLED=1, and without."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import EXAMPLES, OF_ONE_STEP, Report, assert_only_the_routers_gradient_differs, call

Train = Callable[..., Report]
ENABLED = {"DENSEMIXER_ENABLED": "1"}


def test_full_fine_tuning(swift: Train) -> None:
    run = swift("sft", "sft.yaml", **ENABLED, DENSEMIXER_METRICS="1")
    assert_only_the_routers_gradient_differs(run, swift("sft", "sft.yaml"))
    assert len(re.findall("DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM", run.log)) == 1
    assert run.log.count("densemixer/router_grad_share_unselected") >= 2


def test_lora_with_the_routers(swift: Train) -> None:
    run = swift("sft", "lora.yaml", **ENABLED)
    assert run.attached == 2
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert run.least_change > 1e-3


def test_frozen_routers(swift: Train) -> None:
    run = swift("sft", "lora.yaml", "--modules_to_save", "lm_head", **ENABLED)
    assert "nothing to train in 2 of 2 layers" in run.log
    assert 'modules_to_save=["mlp.gate"]' in run.log


def test_dpo(swift: Train, tiny: Path) -> None:
    """The reference stays as it is: the first loss is log 2, that of two equal models."""
    run = swift("rlhf", "dpo.yaml", "--dataset", str(tiny / "data" / "dpo.json"), **ENABLED)
    assert run.attached == 2
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]


def test_the_examples(tmp_path: Path, tiny: Path) -> None:
    """As their README says."""
    text = (EXAMPLES / "ms_swift" / "README.md").read_text()
    first, *commands = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)[-1].splitlines()
    assert first == "python ../llamafactory/make_tiny.py tiny 128"
    for yaml in EXAMPLES.glob("ms_swift/*.yaml"):
        (tmp_path / yaml.name).symlink_to(yaml)
    (tmp_path / "tiny").symlink_to(tiny)
    log = call(["bash", "-euc", commands[0]], tmp_path, Path(__file__).parent)
    (lines,) = tmp_path.glob("out/*/logging.jsonl")
    logged = [json.loads(line) for line in lines.read_text().splitlines()]
    assert 0 < logged[0]["densemixer/router_grad_share_unselected"] < 1
    assert "budget 0.125, metrics True" in log
