"""The unmodified command where the package was installed as users install it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from installs import Environment, build_wheel, run
from llamafactory_runs import EXAMPLES, SCRIPTS, LlamaFactory

COMMANDS = ("llamafactory-cli", "torchrun")


def train_command(llamafactory: LlamaFactory, output: Path) -> list[str | Path]:
    tiny = (llamafactory.folder / "tiny" / "sft").read_text().split()
    return ["llamafactory-cli", "train", EXAMPLES / "full_sft.yaml", *tiny, "max_steps=1", f"output_dir={output}"]


@pytest.mark.parametrize(("kind", "torchrun"), [("wheel", "1"), ("editable", "0")])
def test_pip(llamafactory: LlamaFactory, tmp_path: Path, kind: str, torchrun: str) -> None:
    """With torchrun, the process that trains is a grandchild of the one started."""
    environment = Environment.create(tmp_path / "environment")
    environment.install(build_wheel(tmp_path, kind))
    environment.borrow(*COMMANDS)
    command = train_command(llamafactory, tmp_path / "out")
    done = environment.run(*command, FORCE_TORCHRUN=torchrun, NPROC_PER_NODE="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DenseMixer is attached to 2 layers" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_densemixer_run_where_pth_files_do_not_run(llamafactory: LlamaFactory, tmp_path: Path) -> None:
    """``pip install --target``: the key is unknown to the plain command, and known under ``densemixer run``."""
    environment = Environment.create(tmp_path / "environment")
    environment.install(build_wheel(tmp_path), "--target", tmp_path / "target")
    environment.borrow(*COMMANDS)
    command = train_command(llamafactory, tmp_path / "out")
    settings = {"PYTHONPATH": str(tmp_path / "target"), "OMP_NUM_THREADS": "1"}

    plain = environment.run(*command, **settings)
    assert plain.returncode != 0
    assert "use_densemixer" in plain.stderr

    fallback = [environment.python, "-m", "densemixer_adapters.cli", "run", "--"]
    done = environment.run(*fallback, *command, **settings, FORCE_TORCHRUN="1", NPROC_PER_NODE="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DenseMixer is attached to 2 layers" in done.stdout


def test_uv_run(llamafactory: LlamaFactory, tmp_path: Path) -> None:
    """A project that depends on this package; `uv run` makes its environment, without the dependencies we borrow."""
    uv = shutil.which("uv", path=str(SCRIPTS)) or shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv: `pip install uv`, or run nox")
    wheel = build_wheel(tmp_path)
    borrowed = ", ".join(
        f"\"{name}; sys_platform == 'never'\"" for name in ("jinja2", "packaging", "rich", "torch", "typer")
    )
    (tmp_path / "pyproject.toml").write_text(
        f"""[project]
name = "training"
version = "0"
requires-python = ">=3.10"
dependencies = ["densemixer-adapters"]

[tool.uv]
environments = ["sys_platform != 'never'"]
override-dependencies = [{borrowed}]

[tool.uv.sources]
densemixer-adapters = {{ path = "{wheel.name}" }}
"""
    )
    start = [uv, "run", "--project", tmp_path, "--offline", "--no-progress"]
    environment = Environment(tmp_path / ".venv")
    made = run([*start, "python", "-c", "from densemixer_adapters import _boot; print(_boot.is_live())"])
    assert made.stdout == "True\n", made.stderr
    environment.borrow(*COMMANDS)
    done = run([*start, *train_command(llamafactory, tmp_path / "out")], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DenseMixer is attached to 2 layers" in done.stdout
