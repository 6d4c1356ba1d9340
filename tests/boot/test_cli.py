"""``densemixer doctor`` and ``densemixer run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from installs import Environment

pytest.importorskip("typer", reason="needs typer, which the package requires; install it with pip")

DOCTOR = ("-m", "densemixer_adapters.cli", "doctor")
RUN = ("-m", "densemixer_adapters.cli", "run", "--")
LIVE = "from densemixer_adapters import _boot; print(_boot.is_live())"


def report(environment: Environment, *arguments: str, **settings: str) -> tuple[int, dict[str, Any]]:
    done = environment.run(environment.python, *DOCTOR, "--json", **settings)
    assert done.stdout, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def fake_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_sound_install(full: Environment) -> None:
    status, checks = report(full)
    assert status == 0, checks
    assert checks["startup hook"]["state"] == "ok"
    assert checks["torch"]["state"] == "ok"
    assert ">=2.9" in checks["torch"]["detail"]


def test_the_report_for_people_says_the_same(full: Environment) -> None:
    done = full.run(full.scripts / "densemixer", "doctor")
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok")][:2] == [
        "python",
        "densemixer-adapters",
    ]


def test_switched_off(full: Environment) -> None:
    status, checks = report(full, DENSEMIXER_BOOT="0")
    assert status == 1
    assert checks["startup hook"]["fix"] == "unset DENSEMIXER_BOOT"


def test_a_version_that_is_not_supported(full: Environment, tmp_path: Path) -> None:
    fake_distribution(tmp_path, "verl", "0.1.0")
    status, checks = report(full, PYTHONPATH=str(tmp_path))
    assert status == 1
    assert checks["verl"]["state"] == "problem"
    assert checks["verl"]["fix"] == 'pip install "verl>=0.9.1"'


def test_a_framework_without_the_modules_that_we_hook(full: Environment, tmp_path: Path) -> None:
    fake_distribution(tmp_path, "llamafactory", "9.9")
    (tmp_path / "llamafactory").mkdir()
    (tmp_path / "llamafactory" / "__init__.py").touch()
    status, checks = report(full, PYTHONPATH=str(tmp_path))
    assert status == 1
    check = checks["hook llamafactory.model.loader"]
    assert (check["state"], check["detail"]) == ("problem", "llamafactory 9.9 has no such module")


def test_a_launcher_of_another_environment(full: Environment, tmp_path: Path) -> None:
    fake_distribution(tmp_path, "llamafactory", "0.9.5")
    (tmp_path / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "torchrun").chmod(0o755)
    _, checks = report(full, PYTHONPATH=str(tmp_path), PATH=str(tmp_path))
    assert checks["command torchrun"]["state"] == "note"
    assert "not of this environment" in checks["command torchrun"]["detail"]
    assert checks["command llamafactory-cli"]["detail"] == "not on PATH"


def test_where_pth_files_do_not_run(target: Environment) -> None:
    status, checks = report(target, PYTHONPATH=str(target.folder / "target"))
    assert status == 1
    assert "densemixer run" in checks["startup hook"]["fix"]


def test_run_reaches_child_processes_where_pth_files_do_not_run(target: Environment) -> None:
    path = str(target.folder / "target")
    child = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {LIVE!r}], text=True))"
    assert target.run(target.python, "-c", LIVE, PYTHONPATH=path).stdout == "False\n"
    for code in (LIVE, child):
        done = target.run(target.python, *RUN, "python", "-c", code, PYTHONPATH=path)
        assert (done.stdout.split(), done.stderr) == (["True"], "")


def test_run_keeps_a_sitecustomize_that_was_there(target: Environment, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("THEIRS = 1\n")
    path = f"{target.folder / 'target'}:{tmp_path}"
    code = f"import sitecustomize; print(sitecustomize.THEIRS, sitecustomize.__file__); {LIVE}"
    done = target.run(target.python, *RUN, "python", "-c", code, PYTHONPATH=path)
    assert done.stdout == f"1 {tmp_path / 'sitecustomize.py'}\nTrue\n"


def test_run_passes_arguments_and_the_exit_status_on(full: Environment) -> None:
    code = "import sys; print(sys.argv[1:]); sys.exit(7)"
    done = full.run(full.python, *RUN, "python", "-c", code, "--json", "-x", "a b")
    assert (done.returncode, done.stdout) == (7, "['--json', '-x', 'a b']\n")


def test_run_says_what_is_wrong_with_its_use(full: Environment) -> None:
    assert full.run(full.python, *RUN).returncode == 2
    missing = full.run(full.python, *RUN, "no-such-command")
    assert (missing.returncode, missing.stderr) == (127, "densemixer run: command not found: no-such-command\n")
    off = full.run(full.python, *RUN, "python", DENSEMIXER_BOOT="0")
    assert off.returncode == 2
    assert "unset it" in off.stderr
