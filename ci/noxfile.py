"""One pinned environment for each framework, and what runs in it.

`make test` runs all default sessions. One of them: `.venv/bin/nox -f ci/noxfile.py -s "transformers(pins='5.23.0')"`;
arguments after `--` go to pytest. `ci/pin.sh` writes the files in `environments/`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nox

CI = Path(__file__).parent.resolve()
ROOT = CI.parent
ORIGINAL = ROOT / ".nox" / "original.pt"

# Two at a time. The tests of a file share what it takes long to set up.
PYTEST = ("pytest", "-n2", "--dist=loadfile")

# DeepSpeed compiles an extension when it is first used. In the home directory, the lock of a compilation that was
# killed would stop every later one.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".nox" / "torch_extensions"))

nox.options.envdir = str(ROOT / ".nox")
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"


def pip_install(session: nox.Session, *arguments: str, **options: Any) -> None:
    """Without compiling all of a package to bytecode, which takes as long as the rest and is mostly never imported."""
    session.install("--no-compile", *arguments, **options)


def install(session: nox.Session, environment: str, compiled: bool = False) -> None:
    """Install a pinned environment. torch comes first and alone, so that nothing else chooses its build."""
    session.chdir(ROOT)
    pip_install(session, "torch==2.13.0")
    requirements = ("-r", str(CI / "environments" / f"{environment}.txt"))
    session.install(*requirements) if compiled else pip_install(session, *requirements)


def install_wheel(session: nox.Session) -> None:
    pip_install(session, "--no-deps", "--force-reinstall", str(ROOT))


def install_editable(session: nox.Session) -> None:
    pip_install(session, "--no-deps", "--editable", str(ROOT))


def install_deepspeed(session: nox.Session) -> None:
    # Only a source distribution, whose setup imports torch; it compiles nothing before it is used.
    pip_install(session, "--no-deps", "--no-build-isolation", "deepspeed==0.19.8", env={"DS_BUILD_OPS": "0"})


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (lint and format) and mypy."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "densemixer_core", "adapters/densemixer_adapters")


@nox.session
def package(session: nox.Session) -> None:
    """The wheel, and both ways of installing."""
    session.chdir(ROOT)
    pip_install(session, "-r", str(CI / "environments" / "package.txt"))
    session.run("pytest", "tests/packaging", *session.posargs)


@nox.session
def original(session: nox.Session) -> None:
    """Run the original densemixer 1.0.1, for comparison."""
    install(session, "original")
    session.run("python", "tests/parity/original.py", str(ORIGINAL), env={"HF_HUB_OFFLINE": "1"})


@nox.session(requires=["original"])
@nox.parametrize("pins", ["5.5.4", "5.23.0"])
def transformers(session: nox.Session, pins: str) -> None:
    """transformers adapter, ways of running: oldest version, editable; newest, a wheel, with core, demo, experiment."""
    install(session, f"transformers-{pins}")
    install_deepspeed(session)
    tests = ["tests/transformers", "tests/parity", "tests/running"]
    if pins == "5.5.4":
        install_editable(session)
    else:
        install_wheel(session)
        tests += ["tests/core", "tests/demo", "tests/experiments"]  # once: torch is the same
    session.run(*PYTEST, *(session.posargs or tests), env={"DENSEMIXER_ORIGINAL": str(ORIGINAL)})


# torchaudio, which LLaMA-Factory imports, does without its compiled libraries if they aren't there; they need CUDA.
WITHOUT_CUDA = """
import importlib.util, pathlib, torch
if not torch.cuda.is_available():
    for library in pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent.glob("lib/*.so"):
        library.unlink()
"""


@nox.session
def llamafactory(session: nox.Session) -> None:
    """LLaMA-Factory, DeepSpeed, open-instruct's launcher, the start-up hook, and the command line."""
    session.chdir(ROOT)
    pip_install(session, "torch==2.13.0")
    pip_install(session, "--no-deps", "-r", str(CI / "environments" / "llamafactory.txt"))
    install_deepspeed(session)
    install_editable(session)
    session.run("python", "-c", WITHOUT_CUDA)
    session.run(*PYTEST, *(session.posargs or ["tests/boot", "tests/llamafactory", "tests/open_instruct"]))


@nox.session
def verl(session: nox.Session) -> None:
    """verl: GRPO, PPO and SFT with its own trainers, Ray and FSDP2, on the CPU; open-instruct's launcher with Ray."""
    install(session, "verl", compiled=True)  # Ray gives its own processes 15 seconds to start
    install_editable(session)
    # Beside it, for one test: verl imports it in every process that finds it.
    megatron = Path(session.virtualenv.location) / "megatron"
    if not megatron.exists():
        pip_install(session, "--no-deps", "--target", str(megatron), "megatron-core==0.16.1")
    session.run(
        *PYTEST,
        *(session.posargs or ["tests/verl", "tests/open_instruct/test_ray.py"]),
        env={"MEGATRON_CORE": str(megatron)},
    )


# The newest from 0.17 on wants Python 3.12, and the oldest has no build for it.
MEGATRON = {"0.13.1": ((3, 10), (3, 11)), "0.16.1": ((3, 10), (3, 13)), "0.19.2": ((3, 12), (3, 13))}
"""The versions of Megatron Core, and the first and last version of Python for each."""


@nox.session
@nox.parametrize("pins", list(MEGATRON))
def megatron(session: nox.Session, pins: str) -> None:
    """Megatron Core: layers and models on one, two and four processes, on the CPU."""
    first, last = MEGATRON[pins]
    if not first <= sys.version_info[:2] <= last:
        session.skip(f"Megatron Core {pins} needs Python {first[0]}.{first[1]} to {last[0]}.{last[1]}")
    install(session, f"megatron-{pins}")
    install_editable(session)
    session.run(*PYTEST, *(session.posargs or ["tests/megatron"]))


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Fine-tune a small Mixture-of-Experts model with and without DenseMixer."""
    install(session, "transformers-5.23.0")
    install_editable(session)
    session.run("python", "examples/demo", *session.posargs)


@nox.session(default=False, requires=["original"])
def bench(session: nox.Session) -> None:
    """Time steps on this machine."""
    install(session, "transformers-5.23.0")
    install_editable(session)
    python = ROOT / ".nox" / "original" / "bin" / "python"
    session.run("python", "benchmarks", *session.posargs, env={"DENSEMIXER_ORIGINAL_PYTHON": str(python)})


@nox.session(default=False)
def bench_budget(session: nox.Session) -> None:
    """How exact the extra gradient is at each budget."""
    install(session, "transformers-5.23.0")
    install_editable(session)
    session.run("python", "benchmarks/budget_error.py", *session.posargs)


@nox.session(default=False)
def experiment(session: nox.Session) -> None:
    """Post-train a small Mixture-of-Experts model on two tasks, in five ways, with seeds, tuning and error bars."""
    install(session, "transformers-5.23.0")
    install_editable(session)
    session.run("python", "experiments", *session.posargs)


@nox.session(default=False)
def gradient_quality(session: nox.Session) -> None:
    """Compare the gradient of routers with the effect of changing the routing."""
    install(session, "transformers-5.23.0")
    install_editable(session)
    session.run("python", "experiments/gradient_quality.py", *session.posargs)
