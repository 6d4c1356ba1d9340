import dataclasses
import sys

import pytest

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
        ({"estimator": 1}, TypeError, "estimator must be a string"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb must be at least 1"),
        ({"workspace_mb": (sys.maxsize >> 20) + 1}, ValueError, "workspace_mb must be at least 1 (MiB) and at most"),
        ({"workspace_mb": "64"}, TypeError, "workspace_mb must be an integer"),
        ({"workspace_mb": True}, TypeError, "workspace_mb must be an integer"),
        ({"budget": 0}, ValueError, "budget must be above 0 and at most 1 (1 evaluates all experts), got 0"),
        ({"budget": 1.5}, ValueError, "budget must be above 0 and at most 1"),
        ({"budget": float("nan")}, ValueError, "budget must be above 0 and at most 1"),
        ({"budget": "1/8"}, TypeError, "budget must be a number, got '1/8'"),
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
        ("DENSEMIXER_BUDGET", "2"),
        ("DENSEMIXER_METRICS", "maybe"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"environment variable {variable}='{value}'"):
        DenseMixerConfig.from_environment({variable: value})
