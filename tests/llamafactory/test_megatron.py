"""``USE_MCA=1``: LLaMA-Factory's own workflows for Megatron Core, with Megatron Core's own models, on the CPU.

They load models through ``mcore_adapter``, which no package index has. Where ROLL_DIR is a checkout of
github.com/alibaba/ROLL, it is taken from there. It is always run with a stand-in for it, in ``stand_in``. Every run is
that of the example, ``megatron_sft.yaml``, but for what a CPU and a tiny model need. The router never selects half of
the experts, so conventional training leaves its rows for them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from installs import is_installed
from llamafactory_runs import EXAMPLES, LlamaFactory
from ranks import run_script
from torch import Tensor

HERE = Path(__file__).parent
ROUTER = "decoder.layers.0.mlp.router.weight"
UNSELECTED = slice(tiny_models.REACHABLE, None)
EXAMPLE: dict[str, Any] = yaml.safe_load((EXAMPLES / "megatron_sft.yaml").read_text())
FUSIONS = ("masked_softmax_fusion", "gradient_accumulation_fusion", "persist_layer_norm", "bias_dropout_fusion")
REAL = {
    "transformer_impl": "local",
    "moe_aux_loss_coeff": 0.0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "moe_grouped_gemm": False,
    "additional_configs": {**dict.fromkeys(FUSIONS, False), "use_cpu_initialization": True},
}
"""What lets mcore_adapter's models run without Transformer Engine and a GPU."""
ON = {"use_densemixer": EXAMPLE.pop("use_densemixer")}
RUNS: dict[str, dict[str, Any]] = {
    "off": {},
    "on": {**ON, "densemixer": {"metrics": True}},
    "pre-training": {**ON, "stage": "pt"},
    "DPO": {**ON, "stage": "dpo", "dataset": "dpo"},
    "Megatron's field": {"additional_configs": {"moe_densemixer": True}},
    "both": {**ON, "additional_configs": {"moe_densemixer": True}},
    "no such layer": {**ON, "densemixer": {"layers": [7]}},
    "the environment": {"environment": {"DENSEMIXER_ENABLED": "1"}},
}


@dataclasses.dataclass(frozen=True)
class Runs:
    """What came of `RUNS`."""

    folder: Path
    report: dict[str, Any]
    start: Tensor
    """The router's weight before training, [experts, hidden]."""

    def state(self, name: str) -> dict[str, Any]:
        return load(self.folder / name)

    def learnt(self, name: str) -> Tensor:
        """How far the router's rows for experts that are never selected were moved, each number of them."""
        return (self.state(name)[ROUTER] - self.start)[UNSELECTED].abs()


@pytest.fixture(scope="module", params=["a stand-in", "mcore_adapter"])
def runs(request: pytest.FixtureRequest, llamafactory: LlamaFactory, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("megatron")
    if request.param == "a stand-in":
        return train(llamafactory, folder, HERE / "stand_in", RUNS | {"frozen": frozen(llamafactory, folder)}, {})
    return train(llamafactory, folder, checkout(), RUNS, REAL)


def checkout() -> Path:
    if "ROLL_DIR" not in os.environ:
        pytest.skip("set ROLL_DIR to a checkout of github.com/alibaba/ROLL, which has mcore_adapter")
    return Path(os.environ["ROLL_DIR"], "mcore_adapter", "src")


def frozen(llamafactory: LlamaFactory, folder: Path) -> dict[str, Any]:
    """Of a model that LLaMA-Factory freezes parts of, since it can see."""
    shutil.copytree(llamafactory.model, folder / "frozen-model")
    (folder / "frozen-model" / "mca_config.json").write_text('{"hf_model_type": "qwen3_vl_moe"}')
    return {**ON, "freeze_language_model": True, "model_name_or_path": str(folder / "frozen-model")}


def train(
    llamafactory: LlamaFactory,
    folder: Path,
    adapter: Path,
    wanted: dict[str, Any],
    settings: dict[str, Any],
    ranks: int = 1,
) -> Runs:
    if not (is_installed("megatron-core") or "MEGATRON_CORE" in os.environ):
        pytest.skip("needs megatron-core, or MEGATRON_CORE, a folder with it; run `nox -s llamafactory`")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llamafactory.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.2)
    tiny_models.make_half_unreachable(model)
    shutil.copytree(llamafactory.model, folder / "model")
    model.save_pretrained(folder / "model")
    common = {
        **EXAMPLE,
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(llamafactory.data),
        "dataset": "sft",
        "template": "qwen",
        "cutoff_len": 63,
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.001,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        **settings,
    }
    each = {
        name: {
            **common,
            "output_dir": str(folder / name),
            **run,
            "additional_configs": settings.get("additional_configs", {}) | run.get("additional_configs", {}),
        }
        for name, run in wanted.items()
    }
    (folder / "runs.json").write_text(json.dumps(each))
    paths = [adapter, HERE.parent / "megatron", os.environ.get("MEGATRON_CORE", ""), *sys.path]
    report = run_script(
        HERE / "train_megatron.py",
        folder / "report.json",
        str(folder / "runs.json"),
        ranks=ranks if ranks > 1 else 0,
        PYTHONPATH=os.pathsep.join(str(path) for path in paths if str(path)),
        HUGGINGFACE_AUTOMAP_CACHE=str(folder / "cache"),
    )
    # A stand-in's model is not that of the checkpoint.
    untrained = load(folder / "frozen")[ROUTER] if "frozen" in wanted else model.model.layers[0].mlp.gate.weight
    return Runs(folder, report, untrained.detach())


def load(run: Path) -> dict[str, Any]:
    """The weights that a run has saved."""
    path = run / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    state: dict[str, Any] = torch.load(path, weights_only=False)["model"]
    return state


@pytest.mark.parametrize(
    ("name", "attached"),
    [
        ("off", {"model": 0}),
        ("on", {"model": 2}),
        ("pre-training", {"model": 2}),
        ("DPO", {"model": 2, "reference": 0}),
        ("Megatron's field", {"model": 2}),
        ("the environment", {"model": 0}),
    ],
)
def test_only_the_model_to_be_trained_is_attached_to(runs: Runs, name: str, attached: dict[str, int]) -> None:
    assert "error" not in runs.report[name], runs.report[name]["error"]
    assert runs.report[name]["attached"] == attached


@pytest.mark.parametrize(("name", "learns"), [("off", False), ("on", True), ("pre-training", True), ("DPO", True)])
def test_routers_learn_from_experts_that_were_not_selected(runs: Runs, name: str, learns: bool) -> None:
    if learns:
        assert runs.learnt(name).mean() > 1e-4
    else:
        assert runs.learnt(name).max() == 0


def test_the_first_loss_is_the_same(runs: Runs) -> None:
    on, off = (runs.report[name]["log"][0]["loss"] for name in ("on", "off"))
    assert on == off


def test_checkpoints_have_nothing_of_it(runs: Runs) -> None:
    """Whoever loads one trains without it, however it was switched on."""
    configurations = {
        name: (runs.folder / name / "mca_config.json").read_text() for name in ("off", "on", "Megatron's field")
    }
    assert all("num_moe_experts" in text and "densemixer" not in text for text in configurations.values())
    assert runs.state("on").keys() == runs.state("off").keys()


def test_two_switches_are_one_too_many(runs: Runs) -> None:
    assert runs.report["both"]["error"] == (
        "ValueError: use_densemixer is set, and so is moe_densemixer in additional_configs. Drop the latter."
    )


def test_metrics_are_in_the_log(runs: Runs) -> None:
    on, off = (runs.report[name]["log"][0] for name in ("on", "off"))
    assert on["densemixer/router_grad_norm"] > 0
    assert on["densemixer/layer_1/router_grad_norm"] > 0
    assert not any("densemixer" in name for name in off)


def test_layers_that_the_model_does_not_have(runs: Runs) -> None:
    assert runs.report["no such layer"]["error"].startswith("ValueError: densemixer: layers=(7,): the model has 2 ")


def test_the_environment_alone_is_not_enough(runs: Runs) -> None:
    """Nor does it reach the model of transformers that LLaMA-Factory makes to prepare batches."""
    messages = runs.report["the environment"]["messages"]
    assert not any("is attached" in text for text in messages)
    (warning,) = [text for text in messages if "USE_MCA" in text]
    assert warning.startswith("DENSEMIXER_ENABLED=1 reaches models of transformers")
    assert warning.endswith("Set use_densemixer: true in the YAML instead.")


def test_frozen_routers_are_one_warning_with_the_fix(runs: Runs) -> None:
    if "frozen" not in runs.report:
        pytest.skip("only models that can see have frozen parts, and no such model of mcore_adapter's runs on a CPU")
    (warning,) = [text for text in runs.report["frozen"]["messages"] if "is frozen" in text]
    assert warning.endswith("In the YAML, set freeze_language_model: false.")


SIZES = {"expert": 1, "pipeline": 2}
"""Ways to spread a model over two ranks, and the batches that each rank takes for two in one step."""


@pytest.mark.parametrize("spread", SIZES)
def test_two_ranks_train_as_one(llamafactory: LlamaFactory, tmp_path: Path, spread: str) -> None:
    """With mcore_adapter alone."""
    ways = {
        1: {"gradient_accumulation_steps": 2},
        2: {"gradient_accumulation_steps": SIZES[spread], f"{spread}_model_parallel_size": 2},
    }
    logs = []
    for ranks, way in ways.items():
        folder = tmp_path / str(ranks)
        folder.mkdir()
        wanted = {"run": {**RUNS["on"], "max_steps": 2, **way}}
        report = train(llamafactory, folder, checkout(), wanted, REAL, ranks).report["run"]
        assert "error" not in report, report["error"]
        logs.append([entry for entry in report["log"] if "loss" in entry])
    names = ["loss", "grad_norm", *(name for name in logs[0][0] if name.startswith("densemixer/"))]
    assert len(names) > 10
    one, two = ([entry[name] for entry in log for name in names] for log in logs)
    assert two == pytest.approx(one, rel=1e-4)
