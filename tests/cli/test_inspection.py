"""``densemixer inspect`` and ``densemixer cost``: from a configuration alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import oracle
import pytest
import torch
import transformers
from families import FAMILIES, tokens
from large import LARGE
from runs import loss_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from densemixer_adapters.cli import inspection
from densemixer_adapters.cli.app import app
from densemixer_adapters.cli.inspection import estimate, inspect_model
from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_core import DenseMixerConfig


def run(*arguments: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_inspect(large: Path) -> None:
    status, report = run("inspect", large)
    assert status == 0
    assert report.pop("layers") == [f"model.layers.{i}.mlp" for i in range(48)]
    assert report == {
        "model": "Qwen3MoeForCausalLM",
        "model_type": "qwen3_moe",
        "supported": True,
        "reason": "",
        "router": "Qwen3MoeTopKRouter",
        "score": "softmax",
        "renormalised": True,
        "experts": 128,
        "without_weights": 0,
        "selected": 8,
        "modules_to_save": ["mlp.gate"],
        "target_parameters": ["mlp.gate.weight"],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_says_what_is_true(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model: Any = family.build()
    model.config.save_pretrained(tmp_path)
    status, report = run("inspect", tmp_path)
    assert status == 0
    with apply_densemixer(model) as handle, torch.no_grad():
        assert report["layers"] == [layer.name for layer in handle.layers]
    block = family.blocks(model)[0]
    assert report["experts"] == block.experts.num_experts
    assert report["selected"] == model.config.num_experts_per_tok
    assert report["renormalised"] == family.renormalised
    parameters = dict(block.named_parameters())
    assert all(name.partition(".")[2] in parameters for name in report["target_parameters"])
    assert all(hasattr(block, name.partition(".")[2]) for name in report["modules_to_save"])


def test_a_model_that_is_not_supported(tmp_path: Path) -> None:
    transformers.Qwen3Config(hidden_size=32, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
    status, report = run("inspect", tmp_path)
    assert status == 1
    assert not report["supported"]
    assert "no Mixture-of-Experts layers" in report["reason"]
    done = CliRunner().invoke(app, ["cost", str(tmp_path)])
    assert done.exit_code == 1
    assert "no Mixture-of-Experts layers" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "cost"])
def test_nothing_to_read(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, str(tmp_path)])
    assert done.exit_code == 2
    assert f"can't use the configuration of {tmp_path}" in done.stderr


SMALL = {
    **LARGE,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
RED = "\x1b[31mred"
BAD: dict[str, tuple[Any, str]] = {
    "a number": (42, "config.json is no JSON object"),
    "a string": ("text", "config.json is no JSON object"),
    "null": (None, "config.json is no JSON object"),
    "a list": ([1], "config.json is no JSON object"),
    "no model type": ({"hidden_size": 1}, "Should have a `model_type` key"),
    "an unknown model type": ({"model_type": RED}, "model type `?[31mred`"),
    "a string for a number": ({"num_attention_heads": "four"}, "expected int, got str"),
    "null for a number": ({"vocab_size": None}, "expected int, got NoneType"),
    "not a number": ({"hidden_size": float("nan")}, "expected int, got float"),
    "no attention heads": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "a negative size": ({"hidden_size": -3}, "negative dimension"),
    "beyond 64 bits": ({"hidden_size": 10**30}, "Overflow"),
    "beyond floats": ({"head_dim": 10**400}, "Overflow"),
    "an unknown activation": ({"hidden_act": RED}, "KeyError"),
    "a dtype that is none": ({"dtype": RED}, "no attribute '?[31mred'"),
    "more experts than there are": (
        {"num_experts_per_tok": 9},
        "model.layers.0.mlp: a token goes through 9 of 8 experts",
    ),
    "no experts": ({"num_experts_per_tok": 0}, "a token goes through 0 of 8 experts"),
}


def write_config(folder: Path, changes: Any) -> Path:
    config = transformers.Qwen3MoeConfig(**SMALL).to_dict()
    unlike = not isinstance(changes, dict) or "model_type" in changes or changes == {"hidden_size": 1}
    (folder / "config.json").write_text(json.dumps(changes if unlike else {**config, **changes}))
    return folder


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["inspect", "cost"])
def test_a_bad_configuration_is_one_line(command: str, case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    done = CliRunner().invoke(app, [command, str(write_config(tmp_path, changes))])
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("densemixer"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert line.startswith(f"densemixer: can't use the configuration of {tmp_path}: ")
    assert message in line
    assert len(line) < 1000
    assert "\x1b" not in done.output


@pytest.mark.parametrize("text", ["", "{", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_configuration_that_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "can't use the configuration of" in done.stderr


CODE = """
from pathlib import Path
from transformers import PreTrainedConfig, Qwen3MoeForCausalLM
Path(__file__ + ".ran").touch()
class Config(PreTrainedConfig):
    model_type = "its own"
class Model(Qwen3MoeForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("command", ["inspect", "cost"])
@pytest.mark.parametrize(("model_type", "status"), [("its own", 2), ("qwen3_moe", 0)])
def test_code_that_comes_with_a_checkpoint_never_runs(
    command: str, model_type: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever standard input says. A model that transformers knows is read by its own class."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = transformers.Qwen3MoeConfig(**SMALL).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": auto_map}))
    (tmp_path / "code.py").write_text(CODE)
    done = CliRunner().invoke(app, [command, str(tmp_path)], input="y\n" * 9)
    assert done.exit_code == status
    assert not list(tmp_path.rglob("*.ran"))
    assert "[y/N]" not in done.output
    if status:
        assert "'its own', and code that comes with a checkpoint isn't run here" in done.stderr


@pytest.mark.parametrize("field", ["attn_implementation", "experts_implementation"])
def test_kernels_that_a_configuration_names_are_not_loaded(field: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(write_config(tmp_path, {field: "somebody/kernel"}))])
    assert done.exit_code == 0, done.stderr


def test_every_supported_architecture_has_a_cost() -> None:
    found = []
    for folder in architectures.found():
        model: Any = architectures.build(folder)
        try:
            cost = estimate(model, 64)
        except UnsupportedModelError:
            continue
        report = inspect_model(model)
        assert 0 < report.selected <= report.experts, folder
        assert cost.extra > 0, folder
        found.append(folder)
    assert len(found) > 20


@pytest.mark.parametrize(
    ("tokens", "ratio", "checkpointed"),
    [(4096, 3.5, 2.9), (40960, 1.9, 1.7)],  # those that docs/cost.md has
)
def test_cost(large: Path, tokens: int, ratio: float, checkpointed: float) -> None:
    status, found = run("cost", large, "--seq-len", tokens)
    assert status == 0
    d, f, e, k, layers, v = 2048, 768, 128, 8, 48, 151936
    attention = 4 * d * (32 + 4) * 128 + 4 * (tokens / 2) * 32 * 128
    forward = layers * (attention + 2 * d * e + k * 6 * d * f) + 2 * d * v
    assert found["forward"] == pytest.approx(forward, rel=1e-9)
    exact, *budgeted = found["settings"]
    assert exact["budget"] == 1
    assert exact["extra"] == layers * e * 6 * d * f
    assert round(exact["step_time"], 1) == ratio
    assert round(exact["step_time_checkpointed"], 1) == checkpointed
    assert [setting["budget"] for setting in budgeted] == [1 / 8, 1 / 16, 1 / 32]
    for setting in budgeted:
        assert setting["extra"] == pytest.approx(layers * (setting["budget"] * (e - k) * 6 * d * f + e * 2 * d))
    for setting in found["settings"]:
        output = 0 if setting["budget"] == 1 else 2 * d + 4  # in bfloat16
        assert setting["saved"] == layers * (4 * (e + 1) + output)
        assert setting["saved_checkpointed"] == 4 * (e + 1) + output


def test_budgets_are_as_cheap_as_promised(large: Path) -> None:
    _, found = run("cost", large, "--seq-len", 4096, "--budget", 1 / 8, "--budget", 1 / 16)
    assert [round(setting["step_time"], 2) for setting in found["settings"]] == [1.30, 1.15]


@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (8, 1), (8, 2), (8, 8), (1, 4)])
def test_what_ranks_send(large: Path, ep: int, tp: int) -> None:
    """By the formula, a token and layer; x and g are in the dtype of the configuration, here bfloat16."""
    _, found = run("cost", large, "--ep", ep, "--tp", tp, "--budget", 1, "--budget", 0.5)
    d, e, numbers = 2048, 128, 4 * 128 / ep * (ep - 1)
    others = (ep - 1) / tp if ep > tp else 0  # slices of x and g that others get
    whole = 8 * e * (tp - 1) / tp if ep == 1 else numbers + others * 2 * 2 * d
    half = whole if ep == 1 else numbers + others * (2 * 2 * d + 4 * (e / ep + 1))
    assert [setting["sent"] for setting in found["settings"]] == pytest.approx([48 * whole, 48 * half])
    done = CliRunner().invoke(app, ["cost", str(large), "--ep", str(ep), "--tp", str(tp), "--budget", "1"])
    assert (f"kB a token: {48e-3 * whole:.4g} (budget 1)." in done.stdout) == (whole > 0)


def test_experts_that_do_not_divide(large: Path) -> None:
    done = CliRunner().invoke(app, ["cost", str(large), "--ep", "3"])
    assert done.exit_code == 2
    assert "128 experts can't be spread over 3 ranks" in done.stderr


def test_a_wrong_budget(large: Path) -> None:
    done = CliRunner().invoke(app, ["cost", str(large), "--budget", "2"])
    assert done.exit_code == 2
    assert "budget must be above 0 and at most 1" in done.stderr


def test_options_count(large: Path) -> None:
    model = inspection.build_empty(str(large))
    whole, half = estimate(model, 4096), estimate(model, 4096, DenseMixerConfig(layers="24:"))
    assert half.forward == whole.forward
    assert half.extra == whole.extra / 2
    assert half.saved == whole.saved / 2
    assert estimate(model, 4096, DenseMixerConfig("conventional")).ratio() == 1
    centered = estimate(model, 4096, DenseMixerConfig("centered"))
    assert centered.saved - whole.saved == 48 * (8 * 4 + 4)
    for estimator in ("densemixer", "centered"):
        drawn = estimate(model, 4096, DenseMixerConfig(estimator, budget=0.125))
        assert drawn.saved - whole.saved == 48 * (2048 * 2 + 4)


def added_operations(model: Any, config: DenseMixerConfig, run: Callable[[Any], Tensor]) -> int:
    """All matrix products of a step, counted by torch, that aren't those of a conventional one."""

    def count(config: DenseMixerConfig) -> int:
        with apply_densemixer(model, config):
            run(model)  # the first forward compares some tokens
            with FlopCounterMode(display=False) as counter:
                run(model).backward()
        return counter.get_total_flops()

    return count(config) - count(DenseMixerConfig("conventional"))


@pytest.mark.parametrize("options", [{}, {"budget": 0.5}, {"estimator": "centered", "budget": 0.25}, {"layers": [0]}])
def test_the_extra_operations_are_those_that_run(options: dict[str, Any]) -> None:
    with oracle.Float64():
        model = FAMILIES["qwen3_moe"].build("eager").double()
        config = DenseMixerConfig(**options)
        extra = added_operations(model, config, loss_of)
    assert extra / tokens().numel() == pytest.approx(estimate(model, 12, config).extra, rel=0.01)


def with_experts_without_weights(folder: str, **options: Any) -> Any:
    if folder not in architectures.found() or transformers.__version__ == "5.5.4":
        pytest.skip("not there, or refused, in this version")
    return architectures.build(folder, **options).double()


@pytest.mark.parametrize("budget", [1, 0.5, 0.25])
@pytest.mark.parametrize("folder", ["longcat_flash", "zaya"])
def test_experts_without_weights_cost_nothing(folder: str, budget: float) -> None:
    """And they take none of the budget. A share of this test's few pairs is rounded to whole ones."""
    with oracle.Float64():
        model, config = with_experts_without_weights(folder), DenseMixerConfig(budget=budget)
        extra = added_operations(model, config, lambda model: model(**architectures.inputs(model))[0].square().sum())
    found = extra / architectures.tokens().numel()
    assert found == pytest.approx(estimate(model, 12, config).extra, rel=0.02)


def test_a_token_goes_through_fewer_experts_where_some_have_no_weights() -> None:
    """3 of 10, so that it goes through 3 · 8/10 with weights in the mean; and all 10 have a score, which is kept."""
    with oracle.Float64():
        some, none = (with_experts_without_weights("longcat_flash", zero_expert_num=count) for count in (2, 0))
        with apply_densemixer(none) as handle:
            layers = handle.layers
        matrices = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    report = inspect_model(some)
    assert (report.experts, report.without_weights, report.selected) == (8, 2, 3)
    ours, theirs = estimate(some, 12), estimate(none, 12)
    router = len(layers) * 2 * 2 * some.config.hidden_size
    assert theirs.forward - ours.forward == pytest.approx(2 * matrices * (3 / 8 - 3 / 10) - router)
    assert ours.saved - theirs.saved == len(layers) * 4 * 2
