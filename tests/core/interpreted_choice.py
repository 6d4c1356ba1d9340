"""Which way is used, in Triton's interpreter; as `interpreted.py`."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import pytest
import torch
from interpreting import ELSEWHERE, RAGGED, TRIAL, both, make

from densemixer_core.kernel import fused, trial

pytest_plugins = ["interpreting"]


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(dict(), torch.float64), (dict(post_norm=True), torch.float32), (dict(tokens=0), torch.float32)],
    ids=str,
)
def test_products_where_the_kernel_does_not_reach(
    change: dict[str, object], dtype: torch.dtype, launches: dict[str, list[int]]
) -> None:
    kernel, products = both(make(dataclasses.replace(RAGGED, **change), dtype))
    assert torch.equal(kernel, products)
    assert not any(launches.values())


def test_products_where_algorithms_must_be_deterministic(launches: dict[str, list[int]]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        kernel, products = both(make(RAGGED))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(kernel, products)
    assert not any(launches.values())


def test_it_is_proved_once_for_each_shape(launches: dict[str, list[int]]) -> None:
    layer, wider = make(RAGGED), make(dataclasses.replace(RAGGED, ffn=19))
    for each in (layer, layer, wider, layer):
        both(each)
    assert launches == {"fused kernel": [TRIAL, 37, 37, TRIAL, 37, 37], "all at once": [TRIAL, TRIAL]}


def test_the_trial_has_a_tile_that_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """As steps have, and what it tunes for is what they look for."""
    monkeypatch.setattr(trial, "_FEWEST", 256)
    monkeypatch.setattr(trial, "_MOST", 4096)
    tried = {trial.trial_tokens(tokens) for tokens in range(1, 9000)}
    assert tried == {trial.trial_tokens(tokens) for tokens in tried} == {251, 507, 1019, 2043, 4091}
    assert all(tokens % rows for tokens in tried for rows in (8, 64, 128))


def test_it_is_proved_for_each_size_of_step(monkeypatch: pytest.MonkeyPatch, be_fastest: Callable[[str], None]) -> None:
    """A step of few tokens may be faster in another way than one of many."""
    monkeypatch.setattr(trial, "_MOST", 32)
    assert [trial.trial_tokens(tokens) for tokens in (1, 11, 12, 27, 28, 5000)] == [11, 11, 27, 27, 27, 27]
    seen = []
    for tokens, way in ((37, "all at once"), (3, "fused kernel"), (30, "one by one"), (16, "one by one")):
        be_fastest(way)
        both(make(dataclasses.replace(RAGGED, tokens=tokens)))
        seen.append([*fused._chosen.values()])
    assert seen[0] == ["all at once"]
    assert seen[1] == seen[2] == seen[3] == ["all at once", "fused kernel"]


def test_experts_that_return_zeros_decide_nothing(
    be_fastest: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """As a down projection that starts from zero. A later backward of layers of that shape decides."""
    be_fastest("all at once")
    layer, usual = make(RAGGED), make(RAGGED)
    with torch.no_grad():
        layer.weights.down.zero_()
    both(layer)
    assert not fused._chosen
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    both(usual)
    assert [*fused._chosen.values()] == ["all at once"]


@pytest.mark.parametrize("weights", [1e38, math.nan])
def test_experts_without_finite_numbers_are_computed_one_by_one(
    weights: float, be_fastest: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Once for all, and nothing is said to be wrong with the ways."""
    be_fastest("all at once")
    layer = make(RAGGED)
    with torch.no_grad():
        layer.weights.down[:1] = weights
    for _ in range(2):
        both(layer)
    assert [*fused._chosen.values()] == ["one by one"]
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "no finite numbers" in record.message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda right: right * 1.1, "is off by 0.1"),
        (lambda right: right * float("nan"), "is off by nan"),
        (lambda right: right.does_not_exist, "doesn't run, so it isn't used: AttributeError"),
    ],
)
@pytest.mark.parametrize("way", ELSEWHERE)
def test_a_way_that_fails_its_proof_is_not_used(
    wrong,
    message: str,
    way: str,
    be_fastest: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    be_fastest(way)
    launch = ELSEWHERE[way].launch
    monkeypatch.setattr(ELSEWHERE[way], "launch", lambda *arguments: wrong(launch(*arguments)))
    layer = make(dataclasses.replace(RAGGED, tokens=3))
    with caplog.at_level(logging.WARNING, "densemixer"):
        for _ in range(2):
            ours, products = both(layer)
            torch.testing.assert_close(ours, products, rtol=1e-4, atol=1e-4)
    assert [f"{way} {message}" in record.message for record in caplog.records] == [True]


def test_one_by_one_where_nothing_else_is_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ELSEWHERE.values():
        monkeypatch.setattr(module, "launch", lambda *arguments: 1 / 0)
    with caplog.at_level(logging.INFO, "densemixer"):
        ours, products = both(make(RAGGED))
    assert torch.equal(ours, products)
    assert caplog.records[-1].message.endswith("one by one 0 ms; computed one by one from now on")


@pytest.mark.parametrize("way", [*ELSEWHERE, "one by one"])
def test_the_log_says_which_is_used(
    way: str, be_fastest: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    be_fastest(way)
    with caplog.at_level(logging.INFO, "densemixer"):
        ours, products = both(make(RAGGED))
    assert torch.equal(ours, products) == (way == "one by one")
    (record,) = caplog.records
    for name in (*ELSEWHERE, "one by one"):
        assert f"{name} {1 if name == way else 2} ms" in record.message
    assert record.message.endswith(f"computed {way} from now on")
