"""What is wrong is said in Axolotl's words, by its own reader of YAMLs and its own loader, before a step is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Configure = Callable[..., Path]
PLUGIN = "densemixer_adapters.axolotl.DenseMixerPlugin"
AXOLOTLS = "axolotl.integrations.densemixer.DenseMixerPlugin"


@pytest.fixture
def load(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Reads a YAML as ``axolotl train`` does."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("AXOLOTL_TEE_STDOUT", "0")
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    monkeypatch.chdir(tmp_path)
    yield lambda **keys: load_cfg(str(configure(tmp_path, **keys)))
    PluginManager.get_instance().plugins.clear()  # else they stay for the next YAML


def test_axolotls_own_plugin_says_what_to_write(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"transformers 5.* write {PLUGIN} in its place"):
        load(plugins=[AXOLOTLS], dense_mixer=True)


def test_so_do_both(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"write {PLUGIN} in its place"):
        load(plugins=[PLUGIN, AXOLOTLS])


def test_axolotls_own_plugin_may_be_off(load: Callable[..., Any]) -> None:
    assert load(plugins=[AXOLOTLS], dense_mixer=False).dense_mixer is False


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("on", "dense_mixer must be true, false or a mapping of options, got 'on'; write true, without quotes"),
        ({"budgte": 0.5}, "dense_mixer: .*budgte.*budget"),
        ({"budget": 2}, "dense_mixer: budget"),
    ],
    ids=str,
)
def test_a_wrong_value(load: Callable[..., Any], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(dense_mixer=value)


@pytest.mark.parametrize("key", ["densemixer", "use_densemixer", "dense_mixers"])
def test_a_misspelt_key(load: Callable[..., Any], key: str) -> None:
    """Axolotl drops what its schema doesn't have, and the plugin is on without its key."""
    with pytest.raises(ValueError, match=rf"^{key}: no such key; did you mean dense_mixer\?"):
        load(plugins=[PLUGIN], dense_mixer=None, **{key: {"estimator": "centered"}})


@pytest.mark.parametrize(
    ("plugins", "key"),
    [
        ([], "dense_mixer"),
        ([], "densemixer"),
        (["axolotl.integrations.liger.LigerPlugin"], "dense_mixer"),
        (["densemixer_adapter.axolotl.DenseMixerPlugin"], "dense_mixer"),
    ],
    ids=["no plugin", "misspelt", "another plugin", "one that can't be loaded"],
)
def test_the_key_that_no_plugin_reads(load: Callable[..., Any], plugins: list[str], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: none of the YAML's plugins reads it.* Add {PLUGIN} to them"):
        load(plugins=plugins, **{"dense_mixer": None, key: True})


def test_no_without_a_plugin(load: Callable[..., Any]) -> None:
    assert "dense_mixer" not in load(plugins=None, dense_mixer=False)


def test_without_the_key_it_is_on_as_axolotls_own_is(load: Callable[..., Any]) -> None:
    assert load(dense_mixer=None).dense_mixer is True


@pytest.mark.parametrize("switch", [True, {}], ids=str)
def test_expert_parallelism(load: Callable[..., Any], switch: Any) -> None:
    with pytest.raises(ValueError, match=r"expert_parallel_size: 2: .*drop expert_parallel_size"):
        load(
            plugins=[PLUGIN, "axolotl.integrations.expert_parallel.ExpertParallelPlugin"],
            expert_parallel_size=2,
            dense_mixer=switch,
        )


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        (
            {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]},
            "In the YAML, set lora_modules_to_save: [mlp.gate].",
        ),
        ({"unfrozen_parameters": ["self_attn"]}, "In the YAML, add mlp.gate.weight to unfrozen_parameters."),
    ],
    ids=["lora", "unfrozen_parameters"],
)
def test_frozen_routers(
    load: Callable[..., Any], caplog: pytest.LogCaptureFixture, keys: dict[str, Any], fix: str
) -> None:
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    cfg = load(**keys)
    with caplog.at_level(logging.WARNING, "densemixer"):
        setup_model_and_trainer(cfg, load_datasets(cfg=cfg))
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "densemixer"]
    assert "nothing to train in 2 of 2 layers" in warning
    assert fix in warning
