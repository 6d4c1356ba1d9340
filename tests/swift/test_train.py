"""``swift sft`` and ``swift rlhf`` under DENSEMIXER_ENABLED=1, and without."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import yaml
from programs import EXAMPLES, OF_ONE_STEP, RATE, Report, assert_only_the_routers_gradient_differs, call, read, train

HERE = Path(__file__).parent
ENABLED = {"DENSEMIXER_ENABLED": "1"}
SGD = f"--optim sgd --lr_scheduler_type constant --max_grad_norm 0 --weight_decay 0 --learning_rate {RATE}"
GRPO = "--use_vllm false --reward_funcs many_kinds --num_generations 4 --per_device_train_batch_size 4"
PROBED = [*SGD.split(), "--external_plugins", str(HERE / "probe_plugin.py"), "--callbacks", "probe"]


def options(tiny: Path, name: str, *more: str) -> list[str]:
    """What the program makes of an example's YAML without vLLM and what is set in the environment; and the probe."""
    found = yaml.safe_load((EXAMPLES / "ms_swift" / name).read_text())
    for key in ("ENV", "vllm_mode"):
        found.pop(key, None)
    texts = [[f"--{key}", *map(str, value if isinstance(value, list) else [value])] for key, value in found.items()]
    return [*itertools.chain(*texts), *(tiny / "swift").read_text().split(), *PROBED, *more]


def logged(folder: Path) -> str:
    (file,) = folder.glob("out/*/logging.jsonl")
    return file.read_text()


def assert_metrics_of_two_steps(log: str) -> None:
    steps = [json.loads(line) for line in log.splitlines() if line.startswith('{"loss"')]
    shares = [step["densemixer/router_grad_share_unselected"] for step in steps]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)


@pytest.fixture(scope="module")
def others(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What else is trained, in one process."""
    data = str(tiny / "data" / "dpo.json")
    commands = {
        "LoRA": ["sft", *options(tiny, "lora.yaml", "--lora_dropout", "0")],
        "LoRA, frozen": ["sft", *options(tiny, "lora.yaml", "--modules_to_save", "lm_head")],
        "DPO": ["rlhf", *options(tiny, "dpo.yaml", "--dataset", data, "--experts_impl", "eager")],  # has a float64
        "GRPO": ["rlhf", *options(tiny, "grpo.yaml", *GRPO.split(), "--max_completion_length", "8")],
    }
    folders = {name: tmp_path_factory.mktemp("other") for name in commands}
    for name, folder in folders.items():
        (folder / "command.json").write_text(json.dumps(commands[name]))
    call([sys.executable, HERE / "many.py", *folders.values()], HERE, HERE, **ENABLED, DENSEMIXER_METRICS="1")
    logs = {name: (folder / "log").read_text() + logged(folder) for name, folder in folders.items()}
    return {name: read(folder / "report.json", logs[name]) for name, folder in folders.items()}


def test_full_fine_tuning(tiny: Path, tmp_path: Path) -> None:
    """As the examples' README says, with plain SGD; the second time without what the YAML sets in the environment."""
    text = (EXAMPLES / "ms_swift" / "sft.yaml").read_text()
    command = ["swift", "sft", "sft.yaml", *(tiny / "swift").read_text().split(), *PROBED]
    reports = {}
    for name, written in {
        "with": text,
        "plain": text.replace("DENSEMIXER_ENABLED: 1", "DENSEMIXER_ENABLED: 0"),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sft.yaml").write_text(written)
        reports[name] = train(command, folder, HERE, DENSEMIXER_BUDGET="1", DENSEMIXER_ESTIMATOR="densemixer")
    run, plain = reports["with"], reports["plain"]
    assert_only_the_routers_gradient_differs(run, plain)
    assert run.log.count("DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM") == 1
    assert_metrics_of_two_steps(logged(tmp_path / "with"))


def test_two_processes(tiny: Path, tmp_path: Path) -> None:
    """Each has its share of the batch, and all of the model. Without use_cpu, each trains for itself on a CPU."""
    variables = {**ENABLED, "NPROC_PER_NODE": "2", "MASTER_PORT": "29595"}
    run = train(["swift", "sft", *options(tiny, "sft.yaml", "--use_cpu", "true")], tmp_path, HERE, **variables)
    assert (run.attached, run.ranks, run.apart) == (2, 2, 0)
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert run.never > 20
    assert run.typical_change > 1e-3


def test_lora_with_the_routers(others: dict[str, Report]) -> None:
    run = others["LoRA"]
    assert run.attached == 2
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert run.typical_change > 1e-3


def test_frozen_routers(others: dict[str, Report]) -> None:
    assert "nothing to train in 2 of 2 layers" in others["LoRA, frozen"].log
    assert 'modules_to_save=["mlp.gate"]' in others["LoRA, frozen"].log


def test_dpo(others: dict[str, Report]) -> None:
    """The reference stays as it is: the first loss is log 2, that of two equal models."""
    run = others["DPO"]
    assert run.attached == 2
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]


def test_grpo(others: dict[str, Report]) -> None:
    """It generates with the model that it trains, by transformers; the rewards are given by a rule."""
    run = others["GRPO"]
    assert run.attached == 2
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert run.never > 20
    assert run.typical_change > 1e-3
    assert_metrics_of_two_steps(run.log)
