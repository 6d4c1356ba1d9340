"""``llamafactory-cli train`` with and without ``use_densemixer: true``.

The tests of one process compare with training without the key; those of several with one process, whose gradients
tests/running and tests/core compare with the oracle.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from installs import is_installed
from llamafactory_runs import EXAMPLES, SGD, LlamaFactory, Run
from pages import REPOSITORY, blocks
from torch import Tensor
from transformers import AutoModelForCausalLM
from yaml import safe_load

V1 = {"data": "v1", "environment": (("USE_V1", "1"),)}
ZERO3 = f"deepspeed={EXAMPLES / 'ds_z3_config.json'}"


def routers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if "mlp.gate" in name}


def change(run: Run, start: dict[str, Tensor]) -> Tensor:
    """Of all routers' weights, by training. An adapter's names have a prefix."""
    found = routers(run.weights)
    assert len(found) == 2
    return torch.cat(
        [(found[name] - start[name.removeprefix("base_model.model.")]).flatten() for name in sorted(found)]
    )


def difference(run: Run, other: Run, start: dict[str, Tensor]) -> float:
    """Of the changes of the routers' weights, relative to the size of ``other``'s."""
    theirs = change(other, start)
    assert theirs.norm() > 0
    return ((change(run, start) - theirs).norm() / theirs.norm()).item()


def same_but_for_the_routers_gradient(run: Run, plain: Run, start: dict[str, Tensor]) -> None:
    assert (run.attached, plain.attached) == (1, 0)
    assert run.losses[0] == plain.losses[0]
    assert difference(run, plain, start) > 0.05
    assert run.weights.keys() == plain.weights.keys()
    assert run.files == plain.files


def test_full_sft(llamafactory: LlamaFactory, start: dict[str, Tensor]) -> None:
    run = llamafactory.train("full_sft.yaml", *SGD)
    same_but_for_the_routers_gradient(run, llamafactory.train("full_sft.yaml", *SGD, key=False), start)
    assert "densemixer" not in (run.output / "config.json").read_text().lower()


def test_without_the_key_nothing_changes(llamafactory: LlamaFactory) -> None:
    hooked = llamafactory.train("full_sft.yaml", *SGD, key=False)
    off = llamafactory.train("full_sft.yaml", *SGD, key=False, environment=(("DENSEMIXER_BOOT", "0"),))
    assert "densemixer" not in hooked.log.lower()
    assert hooked.losses == off.losses
    assert all(torch.equal(weight, off.weights[name]) for name, weight in hooked.weights.items())
    assert hooked.files == off.files


def test_lora_trains_the_router_and_exports(llamafactory: LlamaFactory, start: dict[str, Tensor]) -> None:
    run = llamafactory.train("lora_sft.yaml", *SGD)
    same_but_for_the_routers_gradient(run, llamafactory.train("lora_sft.yaml", *SGD, key=False), start)

    merged = llamafactory.folder / "merged"
    llamafactory.fork(
        "export",
        EXAMPLES / "lora_export.yaml",
        f"model_name_or_path={llamafactory.model}",
        f"adapter_name_or_path={run.output}",
        "template=qwen",
        f"export_dir={merged}",
        "infer_dtype=float32",
    )
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert model.state_dict().keys() == AutoModelForCausalLM.from_pretrained(llamafactory.model).state_dict().keys()
    for name, weight in routers(run.weights).items():
        torch.testing.assert_close(
            model.get_parameter(name.removeprefix("base_model.model.")), weight, check_dtype=False
        )


def test_routers_alone(llamafactory: LlamaFactory, start: dict[str, Tensor]) -> None:
    """From an adapter that has nothing but routers, as the page says."""
    page = blocks(REPOSITORY / "docs" / "router-only.md")
    _, adapted, saved = (block.text for block in page if block.language == "python")
    (settings,) = (block.text for block in page if block.language == "yaml")
    place = llamafactory.folder / "routers"
    names = {"model": AutoModelForCausalLM.from_pretrained(llamafactory.model, dtype=torch.float32)}
    exec(adapted + saved.replace("routers", str(place)), names)
    values = [f"{key}={value}" for key, value in safe_load(settings.replace("routers", str(place))).items()]
    values = [value for value in values if not value.startswith(("use_densemixer=", "densemixer="))]
    run = llamafactory.train("lora_sft.yaml", *SGD, *values, "densemixer.estimator=centered")
    plain = llamafactory.train("lora_sft.yaml", *SGD, *values, key=False)
    assert len(run.weights) == 2
    same_but_for_the_routers_gradient(run, plain, start)


def test_dpo(llamafactory: LlamaFactory, start: dict[str, Tensor]) -> None:
    """That the reference stays untouched: attached once, and the first loss is log 2, that of two equal models."""
    run = llamafactory.train("dpo.yaml", *SGD, "max_steps=2", data="dpo")
    same_but_for_the_routers_gradient(
        run, llamafactory.train("dpo.yaml", *SGD, "max_steps=2", data="dpo", key=False), start
    )
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize(
    ("yaml", "overrides"),
    [
        pytest.param("full_sft.yaml", (), id="ddp"),
        pytest.param("zero3.yaml", (ZERO3,), id="zero3"),
        pytest.param("lora_sft.yaml", (ZERO3,), id="zero3-lora"),
    ],
)
def test_two_ranks_train_like_one(
    llamafactory: LlamaFactory, start: dict[str, Tensor], yaml: str, overrides: tuple[str, ...]
) -> None:
    alone = "lora_sft.yaml" if yaml == "lora_sft.yaml" else "full_sft.yaml"
    one = llamafactory.train(alone, *SGD)
    two = llamafactory.train(yaml, *SGD, *overrides, "per_device_train_batch_size=2", ranks=2)
    assert two.attached == 1  # rank 0 says so
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.weights.keys() == one.weights.keys()
    assert difference(two, one, start) < 1e-3
    assert difference(one, llamafactory.train(alone, *SGD, key=False), start) > 0.05


def test_router_metrics(llamafactory: LlamaFactory) -> None:
    """In the Trainer's log, on two ranks of ZeRO-3, which train as without them."""
    settings = *SGD, ZERO3, "per_device_train_batch_size=2"
    run = llamafactory.train("zero3.yaml", *settings, "densemixer.metrics=true", ranks=2)
    plain = llamafactory.train("zero3.yaml", *settings, ranks=2)
    assert run.losses == plain.losses
    assert all(torch.equal(weight, plain.weights[name]) for name, weight in run.weights.items())
    state = json.loads((run.output / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "densemixer/router_grad_norm" in entry]
    assert len(logged) == len(run.losses)
    for entry in logged:
        assert 0 < entry["densemixer/router_grad_norm"] < entry["grad_norm"]
        assert 0 < entry["densemixer/layer_1/router_grad_share_unselected"] < 1
    assert logged[-1]["densemixer/logit_drift"] > 0
    assert "densemixer/" not in (plain.output / "trainer_state.json").read_text()


BADAM = (*SGD, "optim=adamw_torch", "learning_rate=0.01", "use_badam=true", "badam_switch_interval=1")


@pytest.mark.skipif(not is_installed("badam"), reason="needs badam 1.4; run `nox -s llamafactory`")
@pytest.mark.parametrize(
    ("mode", "measured"),
    [
        ("ratio", {"router_grad_norm", "routing_change", "updates_lost"}),
        ("layer", {"router_grad_norm", "routing_change"}),
    ],
)
def test_badam(llamafactory: LlamaFactory, mode: str, measured: set[str]) -> None:
    """Its gradients are sparse, or its layers take turns: then it's no mistake that the others' routers are frozen."""
    settings = *BADAM, f"badam_mode={mode}"
    run = llamafactory.train("full_sft.yaml", *settings, "densemixer.metrics=true")
    if mode == "ratio":
        plain = llamafactory.train("full_sft.yaml", *settings)
        assert run.losses == plain.losses
        assert all(torch.equal(weight, plain.weights[name]) for name, weight in run.weights.items())
    assert "frozen" not in run.log
    state = json.loads((run.output / "trainer_state.json").read_text())
    for entry in state["log_history"][: len(run.losses)]:
        assert {f"densemixer/{name}" for name in measured} <= entry.keys()


def test_the_v1_engine(llamafactory: LlamaFactory, start: dict[str, Tensor]) -> None:
    def losses(run: Run) -> list[str]:
        return re.findall(r"loss['\"]?[:=] *([0-9.]+)", run.log)

    arguments: dict[str, Any] = V1
    run = llamafactory.train("v1_sft.yaml", **arguments)
    plain = llamafactory.train("v1_sft.yaml", **arguments, key=False)
    assert (run.attached, plain.attached) == (1, 0)
    assert len(losses(run)) >= 3
    assert losses(run)[0] == losses(plain)[0]
    assert run.weights.keys() == plain.weights.keys()
    assert run.files == plain.files
    assert difference(run, plain, start) > 0.05


def test_going_on_from_a_checkpoint(llamafactory: LlamaFactory) -> None:
    """As the page says: from a model that is loaded from it too."""
    whole = llamafactory.train("full_sft.yaml", *SGD, "save_steps=2", "save_only_model=false")
    checkpoint = whole.output / "checkpoint-2"
    assert checkpoint.exists()
    model = (f"model_name_or_path={checkpoint}", f"resume_from_checkpoint={checkpoint}")
    rest = llamafactory.train("full_sft.yaml", *SGD, *model)
    assert rest.attached == 1
    assert all(torch.equal(weight, rest.weights[name]) for name, weight in whole.weights.items())


def test_what_is_saved_of_the_best_model(llamafactory: LlamaFactory) -> None:
    """As the page says: the experts in the output folder are those of the last step. By the loss the first step is the
    worst, so here it is the best."""
    steps = ("save_steps=1", "save_only_model=false", "eval_strategy=steps", "eval_steps=1", "val_size=4")
    best = ("load_best_model_at_end=true", "metric_for_best_model=eval_loss", "greater_is_better=true")
    run = llamafactory.train("full_sft.yaml", *SGD, *steps, *best)
    state = json.loads((run.output / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(run.output / "checkpoint-1")
    first, last = (Run("", run.output / f"checkpoint-{step}").weights for step in (1, 3))
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert {".experts." in name for name in moved} == {False, True}
    for name in moved:
        assert torch.equal(run.weights[name], (last if ".experts." in name else first)[name])
