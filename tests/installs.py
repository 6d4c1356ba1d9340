"""Virtual environments with this package in them, built as a user's installer would."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def is_installed(distribution: str) -> bool:
    """By its metadata: the folders of our tests look like packages of the same names to Python."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run without any setting of ours but those given. Doesn't raise if the command fails."""
    return subprocess.run(
        [str(part) for part in command], env={**clean(), **environment}, capture_output=True, text=True, timeout=570
    )


def clean() -> dict[str, str]:
    """The environment of this process without any setting of ours, without a network or a GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DENSEMIXER_", "PYTHON"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def build_wheel(folder: Path, kind: str = "wheel") -> Path:
    """The wheel that pip would build, of kind ``"wheel"`` or ``"editable"``."""
    if subprocess.run([sys.executable, "-c", "import hatchling, editables"], capture_output=True).returncode:
        pytest.skip("needs hatchling and editables: `pip install hatchling editables`, or run nox")
    code = f"import sys, hatchling.build; print(hatchling.build.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return folder / done.stdout.split()[-1]


class Environment:
    """A virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scripts = folder / "bin"
        self.python = self.scripts / "python"

    @property
    def packages(self) -> Path:
        (folder,) = self.folder.glob("lib/python3.*/site-packages")
        return folder

    @classmethod
    def create(cls, folder: Path, python: Path | str = sys.executable) -> Environment:
        run([python, "-m", "venv", "--symlinks", "--without-pip", folder]).check_returncode()
        return cls(folder)

    def install(self, wheel: Path, *options: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "install"]
        done = run([*pip, "--quiet", "--no-deps", "--no-index", *options, wheel])
        assert done.returncode == 0, done.stderr

    def uninstall(self, distribution: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "uninstall"]
        done = run([*pip, "--quiet", "--yes", distribution])
        assert done.returncode == 0, done.stderr

    def borrow(self, *scripts: str) -> None:
        """Let it import what the running environment has, and give it some of its commands.

        Only the folder is added: the .pth files in it, maybe of this package, don't run a second time.
        """
        own = Path(sys.executable).parent
        borrowed = next(path for path in sys.path if path.endswith("site-packages"))
        (self.packages / "zz_borrowed.pth").write_text(borrowed + "\n")
        for name in scripts:
            text = re.sub(r"\A#!.*", f"#!{self.python}", (own / name).read_text())
            (self.scripts / name).write_text(text)
            (self.scripts / name).chmod(0o755)

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.scripts), os.environ["PATH"]])
        return run(list(command), **{"PATH": path, **environment})
