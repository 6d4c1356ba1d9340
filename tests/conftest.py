"""Environments in which the package is installed as users install it, for the start-up hook and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from installs import Environment, build_wheel

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the original package."""
    folder = tmp_path_factory.mktemp("original")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "densemixer==1.0.1"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs densemixer 1.0.1 from a package index: {done.stderr[-300:]}")
    (wheel,) = folder.glob("densemixer-*.whl")
    return wheel


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The wheel and nothing else: no torch, no typer."""
    environment = Environment.create(tmp_path_factory.mktemp("environments") / "bare")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The wheel, and all packages of the environment that runs the tests."""
    environment = Environment.create(tmp_path_factory.mktemp("environments") / "full")
    environment.install(wheel)
    environment.borrow("torchrun")
    return environment


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An environment with the wheel in a folder of its own, ``pip install --target``: its .pth files don't run."""
    return create_target(tmp_path_factory.mktemp("environments") / "target", wheel)


@pytest.fixture
def own_target(tmp_path: Path, wheel: Path) -> Environment:
    """The same, for a test that changes it."""
    return create_target(tmp_path / "target", wheel)


def create_target(folder: Path, wheel: Path) -> Environment:
    environment = Environment.create(folder)
    environment.borrow()
    environment.install(wheel, "--target", environment.folder / "target")
    return environment
