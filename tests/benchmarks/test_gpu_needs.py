"""What the parts of `make gpu` and its recipe need is named, also where pip installs nothing but what is named."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
from gpu_parts import PARTS, Part
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MACHINE = ("torch", "triton", "transformers")
PACKAGES = metadata.packages_distributions()


def required(package: str) -> set[str]:
    """What an installed package requires itself."""
    requirements = map(Requirement, metadata.requires(package) or ())
    return {canonicalize_name(one.name) for one in requirements if not one.marker or one.marker.evaluate({"extra": ""})}


def brought(packages: Iterable[str]) -> set[str]:
    """Them, and what pip installs with them."""
    found: set[str] = set()
    left = [*packages]
    while left:
        if (package := left.pop()) not in found:
            found.add(package)
            left += required(package)
    return found


def lacking(packages: set[str]) -> set[str]:
    """What isn't there if those that require torch are installed alone, the others with what they require."""
    alone = {package for package in packages if "torch" in brought([package])}
    there = brought(packages - alone) | brought(MACHINE) | alone
    return set().union(*map(required, alone)) - there


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_part_names_what_it_needs(part: Part) -> None:
    absent = [name for name in (*MACHINE, *part.needs) if name not in PACKAGES]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    assert lacking({canonicalize_name(PACKAGES[name][0]) for name in part.needs}) == set()


def test_the_recipe_names_what_it_needs() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    downloaded, installed = (
        {canonicalize_name(word) for line in lines for word in shlex.split(line) if re.fullmatch(r"[a-z][\w-]+", word)}
        - {"pip", "download", "install", "wheels", "densemixer-adapters"}
        for lines in (re.findall("^pip download.*", page, re.M), re.findall("^pip install.*", page, re.M))
    )
    assert downloaded == installed
    try:
        assert lacking(downloaded) == set()
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"needs {error.name}")
