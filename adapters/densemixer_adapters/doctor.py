"""What is installed, which hooks are live, and what to do about each problem."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from densemixer_adapters import _boot, site_hook

DISTRIBUTION = "densemixer-adapters"
STARTUP_FILES = ("densemixer.pth", "densemixer.start", site_hook.FILE)
LAUNCHERS = {"llamafactory": ("llamafactory-cli", "torchrun")}
"""The commands that start a framework's processes, by its distribution."""
DISTRIBUTIONS = {"megatron": "megatron-core"}
"""The distribution that a framework's package comes from, where it has another name."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: What was looked at.
        state: ``"problem"`` means that something doesn't work, ``"note"`` that it may be meant.
        detail: What was found.
        fix: What to do about it; empty if nothing.
    """

    name: str
    state: Literal["ok", "note", "problem"]
    detail: str
    fix: str = ""


def examine() -> list[Check]:
    """Look at this interpreter and its environment. Imports none of the frameworks."""
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.metadata["Name"]:  # the first on the path is the one that gets imported
            installed.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return [
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        _package(),
        _startup(),
        *_libraries(installed),
        *_hooks(installed),
        *_launchers(installed),
    ]


def _package() -> Check:
    where = str(Path(__file__).parent)
    try:
        return Check(DISTRIBUTION, "ok", f"{importlib.metadata.version(DISTRIBUTION)} at {where}")
    except importlib.metadata.PackageNotFoundError:
        return Check(DISTRIBUTION, "problem", f"at {where}, but not installed", f"pip install {DISTRIBUTION}")


def _startup() -> Check:
    name = "startup hook"
    if _boot.is_live():
        return Check(name, "ok", "live in every Python process started like this one")
    if _boot.is_switched_off():
        return Check(name, "problem", f"switched off by {_boot.SWITCH}", f"unset {_boot.SWITCH}")
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    found = [str(Path(folder, file)) for folder in folders for file in STARTUP_FILES if Path(folder, file).exists()]
    if found:
        detail = f"not live, though {found[0]} exists (python -S?)"
        return Check(name, "problem", detail, f"pip install --force-reinstall {DISTRIBUTION}")
    return Check(
        name,
        "problem",
        "not live: installed in a folder where Python runs no .pth files (e.g. pip install --target)",
        "`densemixer setup` writes one there where they run; or start your command with `densemixer run -- COMMAND`",
    )


def _libraries(installed: dict[str, str]) -> Iterator[Check]:
    """Each library that we declare a version of."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, declared):
        extra = "" if requirement.marker is None else str(requirement.marker)
        version = installed.get(canonicalize_name(requirement.name))
        supported = f"supported: {requirement.specifier or 'any'}"
        if "dev" in extra:
            continue
        if version is None:
            if extra:
                yield Check(requirement.name, "note", f"not installed ({supported})")
            else:
                yield Check(requirement.name, "problem", "not installed", f"pip install {requirement.name}")
        elif requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "ok", f"{version} ({supported})")
        else:
            wanted = f'pip install "{requirement.name}{requirement.specifier}"'
            yield Check(requirement.name, "problem", f"{version} ({supported})", wanted)


def _hooks(installed: dict[str, str]) -> Iterator[Check]:
    """Each module that we patch, if its framework is installed: whether this version has it."""
    for module in _boot.PATCHES:
        framework, *inner = module.split(".")
        distribution = DISTRIBUTIONS.get(framework, framework)
        if distribution not in installed:
            continue
        spec = importlib.util.find_spec(framework)  # of a top-level package: doesn't import it
        folders = [] if spec is None else spec.submodule_search_locations or []
        if not any(Path(folder, *inner).with_suffix(".py").exists() for folder in folders):
            if module in _boot.IN_SOME_VERSIONS:
                continue
            detail = f"{distribution} {installed[distribution]} has no such module"
            yield Check(f"hook {module}", "problem", detail, f'pip install "{DISTRIBUTION}[{framework}]"')
        elif _boot.is_live():
            yield Check(f"hook {module}", "ok", "live")
        else:
            yield Check(f"hook {module}", "problem", "not live", "see startup hook")


def _launchers(installed: dict[str, str]) -> Iterator[Check]:
    """Whether the commands that start a framework belong to this environment."""
    scripts = Path(sysconfig.get_path("scripts")).resolve()
    for framework, commands in LAUNCHERS.items():
        for command in commands if framework in installed else ():
            found = shutil.which(command)
            if found is not None and Path(found).parent.resolve() == scripts:
                yield Check(f"command {command}", "ok", found)
            else:
                detail = "not on PATH" if found is None else f"{found} is not of this environment ({scripts})"
                yield Check(f"command {command}", "note", detail, f'export PATH="{scripts}:$PATH"')
