"""Plants faults into code that is loaded already, and runs ``densemixer selftest`` on it in this process."""

from __future__ import annotations
import __future__

import importlib
import importlib.util
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from densemixer_adapters.cli.app import app


def plant(patch: pytest.MonkeyPatch, function: Callable[..., Any], right: str, wrong: str) -> None:
    """Whoever imported the function has the wrong one: it is the same function, with other code."""
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(right) == 1
    code = compile(text.replace(right, wrong), "<fault>", "exec", __future__.annotations.compiler_flag)
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    patch.setattr(function, "__code__", made[function.__name__].__code__)


def plant_in_module(patch: pytest.MonkeyPatch, folder: Path, name: str, right: str, wrong: str) -> None:
    """A wrong copy of a module of Triton's kernels, for all that import it from now on."""
    real = importlib.import_module(name)
    text = inspect.getsource(real)
    assert text.count(right) == 1
    file = folder / f"{name}.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    package, _, last = name.rpartition(".")
    patch.setattr(sys.modules[package], last, module)


def selftest_here(*checks: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and outcomes."""
    done = CliRunner().invoke(app, ["selftest", *checks, "--json"])
    return done.exit_code, json.loads(done.stdout)["outcomes"]


def failed(outcomes: list[dict[str, Any]]) -> list[str]:
    """The cases that failed."""
    return [f"{outcome['check']}: {outcome['case']}" for outcome in outcomes if outcome["state"] == "failed"]
