"""``densemixer doctor``, ``setup`` and ``run``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import packaging
import pytest
from installs import REPOSITORY, Environment

from densemixer_adapters.cli.doctor import TESTED, Check, check_environment, frameworks

pytest.importorskip("typer", reason="needs typer, which the package requires; install it with pip")

DOCTOR = ("-m", "densemixer_adapters.cli", "doctor")
SETUP = ("-m", "densemixer_adapters.cli", "setup")
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
    """Of which one has an extra of ours that installs it, and the other hasn't."""
    for name in ("llamafactory", "mcore_adapter"):
        fake_distribution(tmp_path, name, "9.9")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    status, checks = report(full, PYTHONPATH=str(tmp_path))
    assert status == 1
    check = checks["hook llamafactory.model.loader"]
    assert (check["state"], check["detail"]) == ("problem", "llamafactory 9.9 has no such module")
    source = re.fullmatch(r'pip install "(.+)\[llamafactory\]"', check["fix"])
    assert source is not None  # where this package was installed from: it is on no index
    assert Path(source[1]).suffix == ".whl"
    check = checks["hook mcore_adapter.models.model_config"]
    assert (check["detail"], check["fix"]) == (
        "mcore-adapter 9.9 has no such module",
        "pip install --upgrade mcore-adapter",
    )


def test_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "empty")
    (environment.packages / "packaging").symlink_to(Path(packaging.__file__).parent)
    code = "from densemixer_adapters.cli import doctor; print(doctor._package().fix)"
    folders = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'adapters'}"
    done = environment.run(environment.python, "-c", code, PYTHONPATH=folders)
    assert done.stdout.strip() == f'pip install "{REPOSITORY}"', done.stderr


def test_frameworks_that_no_extra_installs() -> None:
    installed = {"torchtitan": "0.3.0", "nemo-automodel": "0.8.0", "numpy": "2.3.0"}
    assert list(frameworks(installed)) == [
        Check("nemo-automodel", "note", "0.8.0 (tested: 0.4.0 and 0.7.0)"),
        Check("torchtitan", "ok", "0.3.0 (tested: 0.3.0)"),
    ]


def test_what_is_said_to_be_tested_are_the_pins() -> None:
    pins = "\n".join(file.read_text() for file in (Path(__file__).parents[2] / "ci" / "environments").glob("*.txt"))
    for framework, versions in TESTED.items():
        found = re.findall(rf"^{re.sub('[-_]', '[-_]', framework)}==(\S+)$", pins, re.MULTILINE)
        assert {*found} == {*versions}, framework


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
    assert "densemixer setup" in checks["startup hook"]["fix"]
    assert "densemixer run" in checks["startup hook"]["fix"]


def test_run_reaches_child_processes_where_pth_files_do_not_run(target: Environment) -> None:
    path = str(target.folder / "target")
    child = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {LIVE!r}], text=True))"
    assert target.run(target.python, "-c", LIVE, PYTHONPATH=path).stdout == "False\n"
    for code in (LIVE, child):
        done = target.run(target.python, *RUN, "python", "-c", code, PYTHONPATH=path)
        assert (done.stdout.split(), done.stderr) == (["True"], "")


@pytest.mark.parametrize("variables", [{}, {"DENSEMIXER_ENABLED": ""}, {"DENSEMIXER_ENABLED": "0"}])
def test_run_enables_densemixer_unless_told_otherwise(target: Environment, variables: dict[str, str]) -> None:
    path = str(target.folder / "target")
    code = (
        "import os; from densemixer_adapters import _boot; "
        "print(os.environ['DENSEMIXER_ENABLED'], 'transformers.modeling_utils' in _boot.patches())"
    )
    done = target.run(target.python, *RUN, "python", "-c", code, PYTHONPATH=path, **variables)
    off = variables.get("DENSEMIXER_ENABLED") == "0"
    assert done.stdout == ("0 False\n" if off else "1 True\n"), done.stderr


def test_run_keeps_a_sitecustomize_that_was_there(target: Environment, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("THEIRS = 1\n")
    path = f"{target.folder / 'target'}:{tmp_path}"
    code = f"import sitecustomize; print(sitecustomize.THEIRS, sitecustomize.__file__); {LIVE}"
    done = target.run(target.python, *RUN, "python", "-c", code, PYTHONPATH=path)
    assert done.stdout == f"1 {tmp_path / 'sitecustomize.py'}\nTrue\n"


@pytest.mark.parametrize("own", [True, False])
def test_run_leaves_a_python_without_the_package_as_it_is(full: Environment, tmp_path: Path, own: bool) -> None:
    """With a `sitecustomize` of its own, or the one that every Python here has, if any."""
    other = Environment.create(tmp_path / "other")
    if own:
        (other.packages / "sitecustomize.py").write_text("THEIRS = 1\n")
    code = (
        "import sys; found = sys.modules.get('sitecustomize'); "
        "print(getattr(found, 'THEIRS', None), *[name for name in sys.modules if 'densemixer' in name])"
    )
    done = full.run(full.python, *RUN, other.python, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n" if own else "None\n", "")


def test_run_has_the_shell_run_a_script_without_a_first_line(full: Environment, tmp_path: Path) -> None:
    script = tmp_path / "train"
    script.write_text('echo "$DENSEMIXER_ENABLED" "$0" "$1" "$2"; exit 5\n')
    script.chmod(0o755)
    for name in (script, "train"):
        path = f"{tmp_path}:{full.scripts}"
        done = full.run(full.python, *RUN, name, "--json", "a b", PATH=path)
        assert (done.returncode, done.stdout) == (5, f"1 {script} --json a b\n"), done.stderr


@pytest.mark.parametrize("kind", ["not executable", "a folder", "no interpreter"])
def test_run_says_what_cannot_be_executed(full: Environment, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "train"
    if kind == "a folder":
        script.mkdir()
    else:
        script.write_text("#!/no/such/interpreter\n")
        script.chmod(0o755 if kind == "no interpreter" else 0o644)
    done = full.run(full.python, *RUN, script)
    assert (done.returncode, done.stdout) == (126, "")
    assert done.stderr.startswith(f"densemixer run: cannot execute: {script}")
    assert len(done.stderr.splitlines()) == 1


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


def test_setup_where_nothing_is_needed(full: Environment) -> None:
    before = sorted(full.packages.iterdir())
    done = full.run(full.python, *SETUP)
    assert (done.returncode, sorted(full.packages.iterdir())) == (0, before)
    assert done.stdout.startswith("Nothing to set up: the hook runs in every Python process of this environment.")
    done = full.run(full.python, *SETUP, "--remove")
    assert (done.returncode, sorted(full.packages.iterdir())) == (0, before)
    assert done.stdout.startswith("Nothing to remove: ")


def test_setup_installs_the_hook_and_undoes_it(own_target: Environment) -> None:
    path = str(own_target.folder / "target")
    before = sorted(own_target.packages.iterdir())
    file = own_target.packages / "densemixer-setup.pth"

    done = own_target.run(own_target.python, *SETUP, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(file) in done.stdout
    assert "`densemixer setup --remove` undoes it" in done.stdout
    assert sorted(own_target.packages.iterdir()) == sorted([*before, file])
    assert own_target.run(own_target.python, "-c", LIVE, PYTHONPATH=path).stdout == "True\n"
    assert report(own_target, PYTHONPATH=path)[1]["startup hook"]["state"] == "ok"
    # Without the package on the path nothing is said or imported; with -S, Python doesn't read the file.
    without = own_target.run(own_target.python, "-c", "import sys; print('densemixer_adapters' in sys.modules)")
    assert (without.stdout, without.stderr) == ("False\n", "")
    assert own_target.run(own_target.python, *SETUP, PYTHONPATH=path).stdout.startswith("Nothing to set up")

    done = own_target.run(own_target.python, *SETUP, "--remove", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (0, f"Deleted {file}.\n")
    assert sorted(own_target.packages.iterdir()) == before
    assert own_target.run(own_target.python, "-c", LIVE, PYTHONPATH=path).stdout == "False\n"


def test_setup_says_why_it_cannot(own_target: Environment) -> None:
    path = str(own_target.folder / "target")
    before = sorted(own_target.packages.iterdir())

    def refusal(*options: str, **variables: str) -> str:
        done = own_target.run(own_target.python, *options, *SETUP, **{"PYTHONPATH": path, **variables})
        assert (done.returncode, done.stdout, sorted(own_target.packages.iterdir())) == (1, "", before)
        return done.stderr

    borrowed = f"{path}:{(own_target.packages / 'zz_borrowed.pth').read_text().strip()}"
    assert "python -S runs no .pth files" in refusal("-S", PYTHONPATH=borrowed)
    assert "DENSEMIXER_BOOT=0 switches the hook off; unset it" in refusal(DENSEMIXER_BOOT="0")
    code = f"import sys; sys.path.insert(0, {path!r}); from densemixer_adapters.cli.app import app; app(['setup'])"
    done = own_target.run(own_target.python, "-c", code)
    assert (done.returncode, sorted(own_target.packages.iterdir())) == (1, before)
    assert f"a new Python process didn't run the hook, so the file is deleted again. Put {path} on" in done.stderr
    # A folder in the file's place: it can't be written, whoever runs the tests.
    (own_target.packages / "densemixer-setup.pth").mkdir()
    before = sorted(own_target.packages.iterdir())
    error = refusal()
    assert f"can't write {own_target.packages / 'densemixer-setup.pth'}" in error
    assert "densemixer run -- COMMAND" in error


ENVIRONMENTS: dict[str, tuple[dict[str, str], str, str, str]] = {
    "nothing": ({}, "ok", "no variable of DenseMixer is set", ""),
    "on": (
        {"DENSEMIXER_ENABLED": "1", "DENSEMIXER_BUDGET": "0.5"},
        "ok",
        "DENSEMIXER_BUDGET=0.5, DENSEMIXER_ENABLED=1",
        "",
    ),
    "off": ({"DENSEMIXER_ENABLED": "0"}, "ok", "DENSEMIXER_ENABLED=0", ""),
    "the hook alone": ({"DENSEMIXER_BOOT": "1"}, "ok", "DENSEMIXER_BOOT=1", ""),
    "no effect": (
        {"DENSEMIXER_ESTIMATOR": "centered"},
        "note",
        "DENSEMIXER_ESTIMATOR=centered: no effect without DENSEMIXER_ENABLED=1",
        "export DENSEMIXER_ENABLED=1",
    ),
    "empty": (
        {"DENSEMIXER_ENABLED": " "},
        "note",
        "DENSEMIXER_ENABLED is set, but empty, and so switches nothing on",
        "export DENSEMIXER_ENABLED=1, or unset it",
    ),
}
WRONG = {
    "DENSEMIXER_ESTIMATER": ("centered", "DENSEMIXER_ESTIMATER (did you mean DENSEMIXER_ESTIMATOR?)"),
    "DENSEMIXER_ENABLED": ("maybe", "environment variable DENSEMIXER_ENABLED='maybe': must be 1 or 0"),
    "DENSEMIXER_BOOT": ("flase", "environment variable DENSEMIXER_BOOT='flase': must be 1 or 0"),
    "DENSEMIXER_QWEN3": ("no way", "environment variable DENSEMIXER_QWEN3='no way': must be 1 or 0"),
    "DENSEMIXER_BUDGET": ("2", "environment variable DENSEMIXER_BUDGET='2': budget must be above 0"),
    "DENSEMIXER_LOG_LEVEL": ("loud", "environment variable DENSEMIXER_LOG_LEVEL='loud': must be one of"),
    "DENSEMIXER_MODELS": (
        "qwen-3",
        "environment variable DENSEMIXER_MODELS: qwen-3: no such model type; did you mean 'qwen3'?",
    ),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_doctor_reads_the_environment(case: str) -> None:
    variables, state, detail, fix = ENVIRONMENTS[case]
    assert list(check_environment({"PATH": "/bin", **variables})) == [Check("environment", state, detail, fix)]


@pytest.mark.parametrize("variable", WRONG)
@pytest.mark.parametrize("switch", [{}, {"DENSEMIXER_ENABLED": "1"}])
def test_doctor_says_what_is_wrong_in_the_environment(variable: str, switch: dict[str, str]) -> None:
    value, message = WRONG[variable]
    (check,) = check_environment({**switch, variable: value})
    assert (check.state, check.fix) == ("problem", "correct or unset it")
    assert message in check.detail


def test_a_wrong_environment_is_a_problem_of_the_report(full: Environment) -> None:
    status, checks = report(full, DENSEMIXER_ESTIMATER="centered")
    assert status == 1
    assert WRONG["DENSEMIXER_ESTIMATER"][1] in checks["environment"]["detail"]


def test_version(full: Environment) -> None:
    done = full.run(full.python, "-m", "densemixer_adapters", "--version")
    wanted = full.run(full.python, "-c", "import importlib.metadata as m; print(m.version('densemixer-adapters'))")
    assert (done.returncode, done.stdout) == (0, wanted.stdout), done.stderr


def test_values_cannot_be_checked_without_torch(bare: Environment, tmp_path: Path) -> None:
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    code = "import os; from densemixer_adapters.cli import doctor; print(*doctor.check_environment(os.environ))"
    done = bare.run(bare.python, "-c", code, PYTHONPATH=str(tmp_path), DENSEMIXER_BUDGET="2")
    assert "DENSEMIXER_BUDGET: can't be checked (No module named 'torch')" in done.stdout, done.stderr
