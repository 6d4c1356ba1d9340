"""The switch in ``override_config``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError
from verl.utils.config import validate_config

from densemixer_adapters.verl import patch_model_config, read_options
from densemixer_core import DenseMixerConfig

CENTERED = {"estimator": "centered", "layers": [0, -1]}


@pytest.mark.parametrize("override", [{}, {"densemixer": False}, {"densemixer": None}, {"model_config": {}}])
def test_off(override: dict[str, Any]) -> None:
    assert read_options(override) is None


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("value", "options"),
    [(True, DenseMixerConfig()), ({}, DenseMixerConfig()), (CENTERED, DenseMixerConfig("centered", layers=[0, -1]))],
)
def test_on(value: Any, options: DenseMixerConfig, nested: bool) -> None:
    override = {"attn_implementation": "sdpa", "densemixer": value}
    assert read_options({"model_config": override} if nested else override) == options


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"densemixer": "yes"}, "override_config.densemixer must be true, false or a mapping of options, got 'yes'"),
        ({"densemixer": "true"}, "got 'true'; write true, without quotes"),
        ({"densemixer": 1}, "must be true, false or a mapping"),
        (
            {"densemixer": {"estimater": "centered"}},
            "unknown option of DenseMixer: 'estimater'; did you mean 'estimator'",
        ),
        ({"densemixer": {"workspace_mb": "big"}}, "override_config.densemixer: workspace_mb must be an integer"),
        ({"dense_mixer": True}, "override_config.dense_mixer: no such key; did you mean override_config.densemixer"),
        ({"use_densemixer": True}, "did you mean override_config.densemixer"),
        ({"model_config": {"DenseMixer": True}}, "did you mean override_config.densemixer"),
    ],
)
def test_what_is_wrong_is_named(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(override)


def validate(path: str) -> None:
    """A configuration in which this is true, and nothing else is there."""
    config = OmegaConf.create()
    OmegaConf.update(config, path, True, force_add=True)
    validate_config(config=config, use_reference_policy=False, use_critic=False)


@pytest.mark.parametrize(
    "path",
    [
        "densemixer",
        "actor_rollout_ref.densemixer",
        "actor_rollout_ref.actor.use_densemixer",
        "actor_rollout_ref.model.densemixer",
        "critic.dense_mixer",
        "actor_rollout_ref.actor.megatron.moe_densemixer",
    ],
)
def test_refused_where_nobody_reads_it(path: str) -> None:
    with pytest.raises(ValueError, match=rf"^{path}: nobody reads it there. DenseMixer's key is"):
        validate(path)


@pytest.mark.parametrize(
    "path",
    [
        "actor_rollout_ref.model.override_config.densemixer",
        "critic.model.override_config.model_config.densemixer",
        "actor_rollout_ref.actor.megatron.override_transformer_config.moe_densemixer",
    ],
)
def test_read_where_it_belongs(path: str) -> None:
    with pytest.raises(ConfigAttributeError, match="trainer"):  # verl's own check begins
        validate(path)


def test_other_keys_are_left_alone() -> None:
    assert read_options({"num_experts": 8, "moe_intermediate_size": 64, "router_aux_loss_coef": 0.0}) is None


def test_the_key_never_reaches_the_configuration_of_the_model() -> None:
    seen: list[dict[str, Any]] = []

    class HFModelConfig:
        pass

    module = SimpleNamespace(
        update_model_config=lambda config, override_config_kwargs: seen.append(override_config_kwargs),
        HFModelConfig=HFModelConfig,
    )
    patch_model_config(module)
    module.update_model_config(None, override_config_kwargs={"densemixer": CENTERED, "bos_token_id": 0})
    assert seen == [{"bos_token_id": 0}]
    with pytest.raises(ValueError, match="unknown option"):
        module.update_model_config(None, override_config_kwargs={"densemixer": {"n": 1}})


@pytest.mark.usefixtures("assets")
@pytest.mark.parametrize("key", ["densemixer", "use_densemixer", "dense_mixer"])
def test_the_key_in_a_place_where_it_is_none(key: str) -> None:
    """As verl's trainers build the configuration of a model from that of the command line."""
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    config = {"_target_": "verl.workers.config.HFModelConfig", "path": "/nowhere", key: True}
    with pytest.raises(Exception, match=f"model.{key}: no such key; did you mean model.override_config.densemixer"):
        omega_conf_to_dataclass(OmegaConf.create(config))


@pytest.mark.usefixtures("assets")
@pytest.mark.parametrize("backend", ["megatron", "veomni", "torchtitan", "fsdp_turbo"])
def test_engines_that_are_not_served_are_refused(backend: str) -> None:
    """By verl's own registry, which the start-up hook has patched."""
    from verl.workers.engine.base import EngineRegistry

    on, off = (SimpleNamespace(override_config={"densemixer": value}) for value in (True, False))
    train, infer = (SimpleNamespace(forward_only=value) for value in (False, True))
    message = f"engine '{backend}' is not supported, only automodel, fsdp, fsdp2 and megatron.* set strategy=fsdp2"
    if backend == "megatron":
        message = "has a switch of its own.*override_transformer_config.moe_densemixer=true"
    with pytest.raises(ValueError, match=message):
        EngineRegistry.new("language_model", backend, model_config=on, engine_config=train)
    for model, engine in ((off, train), (on, infer)):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever verl says: no such engine, or not this way
            EngineRegistry.new("language_model", backend, model_config=model, engine_config=engine)
        assert "densemixer" not in str(caught.value)
