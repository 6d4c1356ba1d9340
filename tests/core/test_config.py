import dataclasses
import re
import sys

import pytest
import torch
from layers import Case, Layer

from densemixer_core import DenseMixerConfig


def test_defaults_are_what_the_published_code_does() -> None:
    assert DenseMixerConfig().estimator == "densemixer"


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DenseMixerConfig().estimator = "centered"  # type: ignore[misc]


def test_from_dict() -> None:
    assert DenseMixerConfig.from_dict({"estimator": "centered", "workspace_mb": 8}) == DenseMixerConfig("centered", 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"estimator": "dense"},
            ValueError,
            "estimator must be one of conventional, densemixer, centered; got 'dense'",
        ),
        ({"estimator": "centred"}, ValueError, "got 'centred'; did you mean 'centered'?"),
        ({"estimator": 1}, TypeError, "estimator must be a string"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb must be at least 1"),
        ({"workspace_mb": 10**400}, ValueError, "workspace_mb must be at least 1 (MiB) and at most"),
        ({"workspace_mb": (sys.maxsize >> 20) + 1}, ValueError, "workspace_mb must be at least 1 (MiB) and at most"),
        ({"workspace_mb": "64"}, TypeError, "workspace_mb must be an integer"),
        ({"workspace_mb": True}, TypeError, "workspace_mb must be an integer"),
        ({"budget": 0}, ValueError, "budget must be above 0 and at most 1 (1 evaluates all experts), got 0"),
        ({"budget": 1.5}, ValueError, "budget must be above 0 and at most 1"),
        ({"budget": float("nan")}, ValueError, "budget must be above 0 and at most 1"),
        ({"budget": "1/8"}, TypeError, "budget must be a number such as 0.125, got '1/8'"),
        ({"budget": True}, TypeError, "budget must be a number"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"metrics": 1}, TypeError, "metrics must be true or false, got 1"),
        ({"estimater": "centered"}, ValueError, "'estimater'; did you mean 'estimator'?"),
        ({"nonsense": 1}, ValueError, "unknown option of DenseMixer: 'nonsense'"),
        (["estimator"], TypeError, "must be a mapping"),
    ],
)
def test_a_wrong_option_is_named(options: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        DenseMixerConfig.from_dict(options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_from_environment() -> None:
    environ = {"DENSEMIXER_ESTIMATOR": "centered", "DENSEMIXER_WORKSPACE_MB": "8", "DENSEMIXER_ENABLED": "1"}
    assert DenseMixerConfig.from_environment(environ) == DenseMixerConfig("centered", 8)
    environ = {"DENSEMIXER_BUDGET": "0.125", "DENSEMIXER_SEED": "7"}
    assert DenseMixerConfig.from_environment(environ) == DenseMixerConfig(budget=0.125, seed=7)
    assert DenseMixerConfig.from_environment({"DENSEMIXER_METRICS": "1"}) == DenseMixerConfig(metrics=True)
    assert DenseMixerConfig.from_environment({"DENSEMIXER_METRICS": "False"}) == DenseMixerConfig()
    assert DenseMixerConfig.from_environment({"DENSEMIXER_ESTIMATOR": ""}) == DenseMixerConfig()


def test_from_environment_reads_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEMIXER_ESTIMATOR", "centered")
    assert DenseMixerConfig.from_environment() == DenseMixerConfig("centered")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DENSEMIXER_ESTIMATOR", "dense"),
        ("DENSEMIXER_WORKSPACE_MB", "much"),
        ("DENSEMIXER_WORKSPACE_MB", "0"),
        ("DENSEMIXER_WORKSPACE_MB", str(2**60)),
        ("DENSEMIXER_BUDGET", "2"),
        ("DENSEMIXER_METRICS", "maybe"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"environment variable {variable}='{value}'"):
        DenseMixerConfig.from_environment({variable: value})


@pytest.mark.parametrize("name", ["workspace_mb", "budget", "seed"])
def test_text_that_is_no_number_is_said_as_elsewhere(name: str) -> None:
    with pytest.raises(TypeError) as elsewhere:
        DenseMixerConfig.from_dict({name: "1/8"})
    variable = f"DENSEMIXER_{name.upper()}"
    with pytest.raises(ValueError, match=re.escape(f"environment variable {variable}='1/8': {elsewhere.value}")):
        DenseMixerConfig.from_environment({variable: "1/8"})


@pytest.mark.parametrize("field", dataclasses.fields(DenseMixerConfig))
def test_a_misspelt_variable_is_named(field: dataclasses.Field[object]) -> None:
    name = f"DENSEMIXER_{field.name.upper()}"
    with pytest.raises(ValueError, match=rf"variable of DenseMixer: {name}X \(did you mean {name}\?\)"):
        DenseMixerConfig.from_environment({f"{name}X": "1", name: "1"})


def test_variables_that_are_no_options_are_known() -> None:
    names = ("BOOT", "ENABLED", "LOG_LEVEL", "MODELS", "OLMOE", "QWEN2", "QWEN3")
    environ = {f"DENSEMIXER_{name}": "0" for name in names}
    assert DenseMixerConfig.from_environment({**environ, "DENSE": "", "densemixer_budget": "9"}) == DenseMixerConfig()
    with pytest.raises(
        ValueError, match=r"DENSEMIXER_A, DENSEMIXER_MODEL \(did you mean DENSEMIXER_MODELS\?\); known:"
    ):
        DenseMixerConfig.from_environment({**environ, "DENSEMIXER_MODEL": "", "DENSEMIXER_A": ""})


@pytest.mark.parametrize("budget", [1, 0.25])
def test_the_largest_workspace_works(budget: float) -> None:
    case = Case(tokens=32, hidden=16, ffn=8)
    default, largest = (
        Layer(case).ours(DenseMixerConfig(budget=budget, workspace_mb=size)) for size in (256, sys.maxsize >> 20)
    )
    assert all(torch.equal(largest[name], default[name]) for name in default)
