"""One layer in one process: every kind of routing and experts, against the dense float64 oracle."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import torch
from cases import CASES
from checks import check

CELLS = [(name, dispatcher) for name, case in CASES.items() for dispatcher in case.dispatchers]


@pytest.mark.parametrize(("name", "dispatcher"), CELLS)
def test_gradients(name: str, dispatcher: str) -> None:
    case = CASES[name]
    if not case.exists:
        pytest.skip(f"of another Megatron Core, whose session runs it: {case.since}, {case.experts}")
    report = check(case, dispatcher)
    assert all(error <= report.allowed[what] for what, error in report.errors.items()), report
    assert report.difference > 0.1, report
    assert report.same_output, report
    assert report.same_experts, report
    assert report.same_measured, report
    assert report.norm < (1e-5 if case.dtype == torch.float32 else 1e-2), report
