"""What the launcher hands to a script, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from installs import is_installed, run

SCRIPT = "import os, sys; print(__name__, *sys.argv[1:], os.environ['DENSEMIXER_ENABLED']); import beside"

pytestmark = pytest.mark.skipif(
    not is_installed("transformers"), reason="needs transformers; run `nox -s llamafactory`"
)


def launch(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "densemixer_adapters.open_instruct", *arguments], **variables)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Laid out as open-instruct is, and the current folder."""
    package = tmp_path / "open_instruct"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("finetune", "dpo", "olmo_core_finetune"):
        (package / f"{name}.py").write_text(SCRIPT)
    (package / "beside.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file(checkout: Path) -> None:
    done = launch("--local_rank=0", "open_instruct/finetune.py", "--seed", "1")
    assert (done.returncode, done.stdout) == (0, "__main__ --local_rank=0 --seed 1 1\n"), done.stderr


def test_an_empty_switch_is_none(checkout: Path) -> None:
    done = launch("open_instruct/finetune.py", DENSEMIXER_ENABLED="")
    assert (done.returncode, done.stdout) == (0, "__main__ 1\n"), done.stderr


def test_a_module_and_a_run_without(checkout: Path) -> None:
    (checkout / "beside.py").touch()  # the current folder is where a module's imports are looked for
    done = launch("finetune", "--seed", "1", DENSEMIXER_ENABLED="0")
    assert (done.returncode, done.stdout) == (0, "__main__ --seed 1 0\n"), done.stderr


@pytest.mark.parametrize("script", ["olmo_core_finetune", "open_instruct.dpo", "open_instruct/olmo_core_finetune.py"])
def test_models_of_olmo_core_are_refused(checkout: Path, script: str) -> None:
    done = launch(script)
    assert done.returncode == 1
    assert (
        f"{script} trains a model of OLMo-core, through which open-instruct can't load or export OLMoE" in done.stderr
    )
    assert "doesn't know experts.gate_up_proj" in done.stderr
    assert "Use finetune, dpo_tune_cache or grpo_fast" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "usage: python -m densemixer_adapters.open_instruct SCRIPT"),
        (["no_such_script"], {}, "no_such_script is neither a file nor a module"),
        (["finetune"], {"DENSEMIXER_BOOT": "0"}, "DENSEMIXER_BOOT=0 switches all hooks off; unset it"),
        (["finetune"], {"DENSEMIXER_LAYERS": "x"}, "environment variable DENSEMIXER_LAYERS='x'"),
    ],
)
def test_what_is_wrong_is_an_error(
    checkout: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    done = launch(*arguments, **variables)
    assert done.returncode == 1
    assert message in done.stderr
    assert not done.stdout
