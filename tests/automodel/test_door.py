"""The key ``densemixer`` where Automodel builds a model, which is a real one on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from installs import is_installed

pytestmark = pytest.mark.skipif(is_installed("verl"), reason="the environment of verl has an older Automodel")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    import make_tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny.save(str(folder))
    return str(folder)


def load(folder: str, **arguments: Any) -> Any:
    import on_cpu  # noqa: F401 - what asks for CUDA gets the CPU
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components.models.common.utils import BackendConfig

    if not arguments.get("force_hf"):
        arguments["backend"] = BackendConfig(
            attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False, experts="torch", dispatcher="torch"
        )
    return NeMoAutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="sdpa", use_liger_kernel=False, **arguments
    )


def attached(model: torch.nn.Module) -> int:
    """How many layers DenseMixer is attached to."""
    owners = (getattr(hook, "__self__", None) for module in model.modules() for hook in module._forward_hooks.values())
    return len({id(owner) for owner in owners if type(owner).__name__ in ("AutomodelLayer", "DenseMixerLayer")})


@pytest.mark.parametrize("force_hf", [False, True])
def test_attached_to_either_kind_of_model(tiny: str, force_hf: bool) -> None:
    model = load(tiny, force_hf=force_hf, densemixer={"layers": [-1]})
    assert attached(model) == 1
    assert "densemixer" not in str(model.config.to_dict()).lower()
    assert attached(load(tiny, force_hf=force_hf)) == attached(load(tiny, force_hf=force_hf, densemixer=False)) == 0


def test_a_model_from_its_configuration_alone(tiny: str) -> None:
    import on_cpu  # noqa: F401
    from nemo_automodel import NeMoAutoModelForCausalLM
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny)
    model = NeMoAutoModelForCausalLM.from_config(config, force_hf=True, use_liger_kernel=False, densemixer=True)
    assert attached(model) == 2


def test_a_section_of_the_yaml(tiny: str, tmp_path: Path) -> None:
    """A mapping there is a node of Automodel's own, and an option on its command line an override."""
    import make_tiny
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config

    source = Path(make_tiny.__file__).with_name("tiny.yaml")
    changes = ["--model.pretrained_model_name_or_path", tiny, "--model.densemixer.layers", "-1:"]
    config = parse_args_and_load_config(str(source), ["-c", str(source), *changes])
    assert attached(config.model.instantiate()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"densemixer": "true"},
            "model.densemixer must be true, false or a mapping of options, got 'true'; write true",
        ),
        ({"densemixer": {"estimater": "centered"}}, "model.densemixer: unknown option of DenseMixer: 'estimater'"),
        ({"use_densemixer": True}, "model.use_densemixer: no such key; did you mean model.densemixer"),
        ({"densemixer": {"layers": [7]}}, "model.densemixer: layers=.*the model has 2 Mixture-of-Experts layers"),
    ],
)
def test_wrong_values(tiny: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny, force_hf=True, **arguments)


@pytest.mark.parametrize("key", ["densemixer", "use_densemixer", "distributed.densemixer"])
def test_a_key_where_nobody_reads_it(key: str) -> None:
    import make_tiny
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config

    source = str(Path(make_tiny.__file__).with_name("tiny.yaml"))
    with pytest.raises(ValueError, match=rf"^{key}: nobody reads it there\. DenseMixer's key is model\.densemixer\.$"):
        parse_args_and_load_config(source, ["-c", source, f"--{key}", "true"])


def test_the_environment(tiny: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It doesn't reach Automodel's own layers, which would train without a word."""
    monkeypatch.setenv("DENSEMIXER_ENABLED", "1")
    assert attached(load(tiny)) == 0
    assert "trains without DenseMixer. Set model.densemixer: true instead." in caplog.text
    caplog.clear()
    assert attached(load(tiny, densemixer=False)) == 0
    assert "DENSEMIXER_ENABLED" not in caplog.text
