"""What LLaMA-Factory's parser and loader say to our keys: errors before the model loads, and warnings with the fix."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from installs import run
from llamafactory_runs import SCRIPTS, LlamaFactory

from densemixer_adapters.environment import patch_modeling_utils
from densemixer_adapters.transformers import DenseMixerLayer, UnsupportedModelError


@pytest.fixture
def arguments(llamafactory: LlamaFactory, tmp_path: Path) -> dict[str, Any]:
    """A YAML's content."""
    return {
        "model_name_or_path": str(llamafactory.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(llamafactory.data),
        "dataset": "sft",
        "template": "qwen",
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "use_cpu": True,
        "use_densemixer": True,
    }


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What LLaMA-Factory's logger and ours are told."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger("llamafactory"), logging.getLogger("densemixer")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)


def parse(arguments: dict[str, Any]) -> Any:
    from llamafactory.hparams import get_train_args

    return get_train_args(arguments)


def load(arguments: dict[str, Any], *, is_trainable: bool = True, **model_settings: Any) -> Any:
    """As ``llamafactory-cli train`` does it, up to the model."""
    from llamafactory.model import load_model, load_tokenizer

    model_args, _, _, finetuning_args, _ = parse(arguments)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    for name, value in model_settings.items():
        setattr(model_args, name, value)
    return load_model(tokenizer, model_args, finetuning_args, is_trainable=is_trainable)


def attached_layers(model: torch.nn.Module) -> set[str]:
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return {owner.name for owner in owners if isinstance(owner, DenseMixerLayer)}


def enable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the start-up hook does it where the environment asks for DenseMixer."""
    from transformers import PreTrainedModel, modeling_utils

    for name in ("from_pretrained", "_from_config"):
        monkeypatch.setattr(PreTrainedModel, name, vars(PreTrainedModel)[name])  # to be restored afterwards
    patch_modeling_utils(modeling_utils)
    monkeypatch.setenv("DENSEMIXER_ENABLED", "1")


def test_the_help_is_the_same_but_for_our_fields(llamafactory: LlamaFactory) -> None:
    def words(boot: str) -> list[str]:
        done = run([SCRIPTS / "llamafactory-cli", "train", "-h"], DENSEMIXER_BOOT=boot, COLUMNS="100000")
        assert done.returncode == 0, done.stderr
        return done.stdout.replace("[--", "\n[--").splitlines()

    plain, ours = words("0"), words("1")
    assert not any("densemixer" in line for line in plain)
    assert [line for line in ours if "densemixer" not in line.lower()] == plain
    assert any("--use_densemixer" in line for line in ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimatr": "centered"}, "densemixer: unknown option of DenseMixer: 'estimatr'; did you mean 'estimator'"),
        ({"estimator": "dense"}, "densemixer: estimator must be one of"),
        ({"layers": "first"}, "densemixer: layers must be a list of positions"),
        ({"workspace_mb": "big"}, "densemixer: workspace_mb must be an integer"),
        ({"metrics": "yes"}, "densemixer: metrics must be true or false"),
        (["centered"], "densemixer: the options of DenseMixer must be a mapping"),
        ("{centered", "densemixer must be a mapping such as {estimator: centered}, or one as JSON"),
    ],
)
def test_wrong_options(arguments: dict[str, Any], options: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse({**arguments, "densemixer": options})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes please", "got 'yes please'$"),
        ("true", "got 'true'; write true, without quotes$"),
        ("off", "got 'off'; write false, without quotes$"),
    ],
)
def test_a_switch_that_is_not_one(arguments: dict[str, Any], value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"use_densemixer must be true or false, {message}"):
        parse({**arguments, "use_densemixer": value})


@pytest.mark.parametrize(
    ("words", "value"),
    [([], None), (["--use_densemixer"], True), (["--use_densemixer", "true"], True), (["--use_densemixer=no"], False)],
)
@pytest.mark.parametrize("engine", ["v0", "v1"])
def test_the_switch_on_a_command_line(
    arguments: dict[str, Any], engine: str, words: list[str], value: bool | None
) -> None:
    """As the two engines parse it where there is no YAML."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.v1.config.model_args import ModelArguments
    from transformers import HfArgumentParser

    parser = HfArgumentParser(FinetuningArguments if engine == "v0" else ModelArguments)
    (parsed,) = parser.parse_args_into_dataclasses(words)
    assert parsed.use_densemixer is value


def test_options_reach_the_layers(arguments: dict[str, Any], messages: list[str]) -> None:
    model = load({**arguments, "densemixer": {"estimator": "centered", "layers": [-1]}})
    assert attached_layers(model) == {"model.layers.1.mlp"}
    (line,) = [text for text in messages if "DenseMixer is attached to" in text]
    assert line.startswith(
        "DenseMixer is attached to 1 layer of Qwen3MoeForCausalLM (qwen3_moe): estimator centered, layers (-1,), "
    )


def test_options_as_json_on_a_command_line(arguments: dict[str, Any]) -> None:
    assert parse({**arguments, "densemixer": '{"layers": "-1:"}'})[3].densemixer == {"layers": "-1:"}


@pytest.mark.usefixtures("llamafactory")
def test_metrics_are_refused_in_the_v1_engine() -> None:
    from llamafactory.v1.config.model_args import ModelArguments

    with pytest.raises(ValueError, match="metrics is not available in the v1 engine"):
        ModelArguments(use_densemixer=True, densemixer={"metrics": True})


def test_options_without_the_switch(arguments: dict[str, Any], messages: list[str]) -> None:
    model = load({**arguments, "use_densemixer": False, "densemixer": {"estimator": "centered"}})
    assert not attached_layers(model)
    assert "densemixer has no effect without use_densemixer: true." in messages


@pytest.mark.parametrize(
    ("keys", "attached"),
    [
        ({}, {"model.layers.0.mlp", "model.layers.1.mlp"}),
        ({"use_densemixer": False}, set()),
        ({"use_densemixer": True, "densemixer": {"layers": [-1]}}, {"model.layers.1.mlp"}),
    ],
    ids=["without the key", "false", "true"],
)
def test_the_key_takes_precedence_over_the_environment(
    arguments: dict[str, Any], keys: dict[str, Any], attached: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enable(monkeypatch)
    del arguments["use_densemixer"]
    assert attached_layers(load({**arguments, **keys})) == attached


def test_the_arguments_can_be_pickled(arguments: dict[str, Any]) -> None:
    """As Ray does it."""
    finetuning_args = parse({**arguments, "densemixer": {"layers": [0]}})[3]
    assert pickle.loads(pickle.dumps(finetuning_args)) == finetuning_args


def test_layers_that_the_model_does_not_have(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^densemixer: layers=\(7,\): the model has 2 Mixture-of-Experts layers"):
        load({**arguments, "densemixer": {"layers": [7]}})


def test_only_the_model_to_be_trained_is_touched(arguments: dict[str, Any]) -> None:
    from llamafactory.train.trainer_utils import create_ref_model

    assert len(attached_layers(load(arguments))) == 2
    assert not attached_layers(load(arguments, is_trainable=False))
    model_args, *_, finetuning_args, _ = parse({**arguments, "stage": "dpo", "dataset": "dpo"})
    assert not attached_layers(create_ref_model(model_args, finetuning_args))


def test_hyper_parallel_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="drop use_hyper_parallel"):
        parse({**arguments, "use_hyper_parallel": True})


@pytest.mark.parametrize("setting", ["use_unsloth", "use_kt"])
def test_other_loaders_are_refused_before_anything_loads(arguments: dict[str, Any], setting: str) -> None:
    with pytest.raises(ValueError, match=f"drop {setting}"):
        load(arguments, **{setting: True}, model_name_or_path="/nowhere")


def test_a_model_without_experts(arguments: dict[str, Any], llamafactory: LlamaFactory, tmp_path: Path) -> None:
    tiny_models.build("Qwen3", vocab_size=512).save_pretrained(tmp_path / "dense")
    for file in llamafactory.model.glob("*token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    dense = {**arguments, "model_name_or_path": str(tmp_path / "dense")}
    with pytest.raises(
        UnsupportedModelError, match=r"^use_densemixer: Qwen3ForCausalLM has no Mixture-of-Experts layers"
    ):
        load(dense)
    load({**dense, "use_densemixer": False})


FROZEN = {
    # settings, of how many layers the routers are frozen, the fix, and the settings with it
    "lora": (
        {"finetuning_type": "lora", "lora_target": "q_proj,v_proj"},
        2,
        "additional_target: mlp.gate",
        {"additional_target": "mlp.gate"},
    ),
    "lora on all": (
        {"finetuning_type": "lora", "lora_target": "all"},
        2,
        "additional_target: mlp.gate",
        {"additional_target": "mlp.gate"},
    ),
    "freeze, one layer": (
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        1,
        "more layers in freeze_trainable_layers, or `densemixer: {layers: ...}` to those that you train",
        {"densemixer": {"layers": [-1]}},
    ),
    "freeze, attention": (
        {"finetuning_type": "freeze", "freeze_trainable_modules": "self_attn"},
        2,
        "freeze_trainable_modules: self_attn,mlp",
        {"freeze_trainable_modules": "self_attn,mlp"},
    ),
}


@pytest.mark.parametrize(
    ("case", "switched_on_by"),
    [*((case, "the key") for case in FROZEN), *((case, "the environment") for case in ("lora", "freeze, attention"))],
)
def test_frozen_routers_are_one_warning_with_the_fix(
    arguments: dict[str, Any],
    messages: list[str],
    case: str,
    switched_on_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever switches it on, in the words of LLaMA-Factory, and not once more in training; the fix mends it."""
    settings, frozen, fix, fixed = FROZEN[case]
    if switched_on_by == "the environment":
        enable(monkeypatch)
        del arguments["use_densemixer"]
    router_gradient(load({**arguments, **settings}))
    (warning,) = [text for text in messages if "frozen (" in text]
    assert f"nothing to train in {frozen} of 2 layers" in warning
    assert warning.endswith(f" In the YAML, set {fix}.")
    if switched_on_by == "the key":
        assert sum(f", of which {2 - frozen} have a router that isn't frozen: " in text for text in messages) == 1
    messages.clear()
    assert router_gradient(load({**arguments, **settings, **fixed})) is not None or "densemixer" in fixed
    assert not any("frozen" in text for text in messages)


@pytest.mark.usefixtures("llamafactory")
@pytest.mark.parametrize(
    ("peft", "fix"),
    [
        ({"name": "lora", "target_modules": ["q_proj"]}, "modules_to_save: [mlp.gate] in peft_config"),
        (
            {"name": "freeze", "freeze_trainable_modules": "self_attn"},
            "freeze_trainable_modules: self_attn,mlp in peft_config",
        ),
    ],
)
def test_frozen_routers_in_the_v1_engine(
    llamafactory: LlamaFactory, messages: list[str], peft: dict[str, Any], fix: str
) -> None:
    from llamafactory.v1.config.model_args import ModelArguments
    from llamafactory.v1.core.model_engine import ModelEngine

    ModelEngine(ModelArguments(model=str(llamafactory.model), use_densemixer=True, peft_config=peft), is_train=True)
    (warning,) = [text for text in messages if "frozen (" in text]
    assert warning.endswith(f" In the YAML, set {fix}.")


def router_gradient(model: torch.nn.Module) -> torch.Tensor | None:
    tokens = torch.arange(3, 67).view(2, 32)
    model.train()(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    gates = [weight for name, weight in model.named_parameters() if "layers.0.mlp.gate" in name]
    return gates[-1].grad  # PEFT's copy comes last


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_auxiliary_loss_under_reentrant_checkpointing(
    arguments: dict[str, Any], messages: list[str], reentrant: bool
) -> None:
    """Also that the warning is still true: without DenseMixer, the auxiliary loss changes the gradient or doesn't."""
    settings = {**arguments, "use_reentrant_gc": reentrant}
    load({**settings, "moe_aux_loss_coef": 1.0})
    assert any("moe_aux_loss_coef gives the routers no gradient" in text for text in messages) is reentrant

    conventional = {**settings, "use_densemixer": False}
    without, with_loss = (router_gradient(load({**conventional, "moe_aux_loss_coef": c})) for c in (None, 10.0))
    assert torch.allclose(without, with_loss) is reentrant


def test_blocks_are_leaf_modules_under_zero3(arguments: dict[str, Any]) -> None:
    """On a live model: loading one under ZeRO-3 takes several processes, see test_train."""
    from deepspeed.utils import get_z3_leaf_modules
    from llamafactory.model import loader
    from transformers.integrations import HfDeepSpeedConfig

    from densemixer_adapters.llamafactory import patch_loader

    model_args, _, _, finetuning_args, _ = parse({**arguments, "finetuning_type": "full"})
    model = load({**arguments, "use_densemixer": False})

    class Loaded:
        """A module whose ``load_model`` returns what is loaded already."""

        @staticmethod
        def load_model(*arguments: Any) -> Any:
            return model

    patch_loader(Loaded)
    assert loader.load_model is not Loaded.load_model
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    Loaded.load_model(None, model_args, finetuning_args, True)
    assert get_z3_leaf_modules(model) == [layer.mlp for layer in model.model.layers]
    del config


def test_a_hook_that_is_missing_is_an_error(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a version of LLaMA-Factory had its arguments where we expect them, and its loader elsewhere."""
    from llamafactory.model import loader

    monkeypatch.setattr(loader, "load_model", loader.load_model.__wrapped__)
    with pytest.raises(RuntimeError, match=r"llamafactory.model.loader.load_model was not hooked.*densemixer doctor"):
        parse(arguments)
    parse({**arguments, "use_densemixer": False})
