"""The hook and the command line under every other version of Python that this machine has.

Without torch, which isn't there for all of them; `ci/noxfile.py` runs everything else with one version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from installs import Environment

MINIMUM = (3, 10)


def other_pythons() -> dict[str, Path]:
    """Interpreters on PATH and of pyenv, by their version without the patch; the last one found of each counts."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    folders = [*map(Path, os.environ["PATH"].split(os.pathsep)), *versions.glob("*/bin")]
    found = {}
    for folder in folders:
        for python in folder.glob("python3.*"):
            if re.fullmatch(r"python3\.\d+", python.name):
                code = "import sys, venv; print(*sys.version_info[:2])"
                # What pyenv puts on PATH may start nothing.
                done = subprocess.run([python, "-c", code], capture_output=True, text=True)
                version = tuple(map(int, done.stdout.split()))
                if version >= MINIMUM and version != sys.version_info[:2]:
                    found[".".join(map(str, version))] = python
    return found


PYTHONS = other_pythons()
LIVE = "from densemixer_adapters import _boot; print(_boot.is_live())"
CLI = ("-m", "densemixer_adapters.cli")


@pytest.fixture(scope="module", params=PYTHONS or [None])
def python(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel and nothing else."""
    if request.param is None:
        pytest.skip("needs another Python, 3.10 or newer, with venv: python3.N on PATH, or one that pyenv installed")
    environment = Environment.create(tmp_path_factory.mktemp(f"python{request.param}"), PYTHONS[request.param])
    environment.install(wheel)
    return environment


def test_it_is_another_version(python: Environment) -> None:
    done = python.run(python.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    assert done.stdout.strip() in PYTHONS


def test_live(python: Environment) -> None:
    done = python.run(python.python, "-c", LIVE)
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert python.run(python.python, "-c", LIVE, DENSEMIXER_BOOT="0").stdout == "False\n"


def test_nothing_more_is_imported(python: Environment) -> None:
    code = "import sys; print(*sorted(name for name in sys.modules if 'densemixer' in name))"
    done = python.run(python.python, "-c", code, DENSEMIXER_ENABLED="1")
    assert done.stdout.split() == ["densemixer_adapters", "densemixer_adapters._boot"]


def test_a_module_is_patched_as_it_is_imported(python: Environment, tmp_path: Path) -> None:
    package = tmp_path / "verl" / "workers" / "config"
    package.mkdir(parents=True)
    (package / "model.py").write_text("VALUE = 1\n")
    (tmp_path / "patches_of_verl.py").write_text("def patch(module): module.VALUE += 1\n")
    code = (
        "from densemixer_adapters import _boot; "
        "_boot.PATCHES = {'verl.workers.config.model': 'patches_of_verl:patch'}; "
        "from verl.workers.config import model; print(model.VALUE, type(model.__loader__).__name__)"
    )
    done = python.run(python.python, "-c", code, PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.stderr) == ("2 SourceFileLoader\n", "")


def test_the_command_line(python: Environment) -> None:
    """With typer installed for that version: it comes with compiled code."""
    wanted = ["typer>=0.16", "packaging", "rich"]  # what the command needs, as in pyproject.toml
    pip = [sys.executable, "-m", "pip", "--python", python.python, "install", "--quiet", "--no-compile"]
    installed = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"needs {' and '.join(wanted)} from a package index: {installed.stderr[-300:]}")
    doctor = python.run(python.python, *CLI, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(doctor.stdout)}
    assert checks["startup hook"]["state"] == "ok", doctor.stdout
    assert python.run(python.python, *CLI, "setup").stdout.startswith("Nothing to set up")
    done = python.run(python.python, *CLI, "run", "--", "python", "-c", f"import os; {LIVE}; os._exit(3)")
    assert done.returncode == 3


def test_the_source_compiles(python: Environment) -> None:
    folders = [python.packages / name for name in ("densemixer_core", "densemixer_adapters")]
    done = python.run(python.python, "-W", "error", "-m", "compileall", "-qf", *folders)
    assert (done.returncode, done.stdout) == (0, "")
