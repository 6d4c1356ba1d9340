"""What the built distributions contain, that they may be released, and that both ways of installing work."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"densemixer_core": ROOT / "densemixer_core", "densemixer_adapters": ROOT / "adapters/densemixer_adapters"}


def source_files() -> set[str]:
    return {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {"densemixer.pth", "densemixer.start"}


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True)
    return out


def test_the_wheel_holds_both_packages_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == source_files()
    assert {"densemixer_core/py.typed", "densemixer_adapters/py.typed"} <= names


def test_the_sdist_holds_what_it_builds_from(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "adapters/densemixer_adapters/_boot.py"}
    assert files <= names


def test_what_a_release_uploads_is_sound(distributions: Path) -> None:
    files = sorted(distributions.iterdir())
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == len(files) == 2


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_both_packages_are_found_after_installing(editable: bool, distributions: Path, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    (wheel,) = distributions.glob("*.whl")
    what = ["--editable", str(ROOT)] if editable else [str(wheel)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *what], check=True)
    script = "import sys; from importlib.util import find_spec as f; print(*(f(name).origin for name in sys.argv[1:]))"
    found = subprocess.run([python, "-c", script, *SOURCES], check=True, capture_output=True, text=True, cwd=tmp_path)
    for (package, folder), origin in zip(SOURCES.items(), found.stdout.split(), strict=True):
        if editable:
            assert Path(origin) == folder / "__init__.py"
        else:
            assert Path(origin).is_relative_to(tmp_path / "lib")
            assert Path(origin).parts[-2:] == (package, "__init__.py")
