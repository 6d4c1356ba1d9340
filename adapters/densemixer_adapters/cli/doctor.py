"""What is installed, which hooks are live, what the environment says, and what to do about each problem."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from densemixer_adapters import _boot
from densemixer_adapters.cli import site_hook

DISTRIBUTION = "densemixer-adapters"
ORIGINAL = "densemixer"
"""The original package; its command, like ours."""
STARTUP_FILES = ("densemixer.pth", "densemixer.start", site_hook.FILE)
LAUNCHERS = {"llamafactory": ("llamafactory-cli", "torchrun")}
"""The commands that start a framework's processes, by its distribution."""
TESTED = {"ms-swift": ("4.6.0",), "nemo-automodel": ("0.4.0", "0.7.0"), "torchtitan": ("0.3.0",), "veomni": ("0.1.12",)}
"""The distributions of frameworks that no extra of ours installs, and the versions that the tests run."""
DISTRIBUTIONS = {"mcore_adapter": "mcore-adapter", "megatron": "megatron-core", "nemo_automodel": "nemo-automodel"}
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
    """Look at this interpreter and its environment.

    Imports none of the frameworks, but for transformers where the environment names model types.
    """
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.metadata["Name"]:  # the first on the path is the one that gets imported
            installed.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return [
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        _package(),
        _startup(),
        *_command(),
        *_original(installed),
        *check_environment(os.environ),
        *_libraries(installed),
        *frameworks(installed),
        *_hooks(installed),
        *_launchers(installed),
    ]


def _package() -> Check:
    where = str(Path(__file__).parents[1])
    try:
        return Check(DISTRIBUTION, "ok", f"{importlib.metadata.version(DISTRIBUTION)} at {where}")
    except importlib.metadata.PackageNotFoundError:
        return Check(DISTRIBUTION, "problem", f"at {where}, but not installed", f'pip install "{_source()}"')


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
        return Check(name, "problem", detail, _reinstall())
    return Check(
        name,
        "problem",
        "not live: installed in a folder where Python runs no .pth files (e.g. pip install --target)",
        "`densemixer setup` writes one there where they run; or start your command with `densemixer run -- COMMAND`",
    )


def _reinstall() -> str:
    """The command that installs this package anew."""
    return f'pip install --force-reinstall --no-deps "{_source()}"'


def _source() -> str:
    """Where to install this package from: where it was, or the checkout that runs; else what the pages call a clone."""
    try:
        origin = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")  # PEP 610
    except importlib.metadata.PackageNotFoundError:
        origin = None
    if origin is not None:
        url = urlsplit(json.loads(origin)["url"])
        path = url2pathname(url.path)
        if url.scheme == "file" and Path(path).exists():
            return path
    checkout = Path(__file__).parents[3]
    return str(checkout) if (checkout / "pyproject.toml").exists() else f"./{DISTRIBUTION}"


def _command() -> Iterator[Check]:
    """Whether the command is ours: the original package has one of the same name, and both installs write it.

    Only where pip installs commands into this environment's own folder: not after ``pip install --target``.
    """
    file = Path(sysconfig.get_path("scripts"), ORIGINAL)
    site_packages = Path(sysconfig.get_path("purelib"))
    if not any(site_packages.glob(f"{DISTRIBUTION.replace('-', '_')}-*.dist-info")):
        return
    name = f"command {ORIGINAL}"
    fix = f"{_reinstall()}; `python -m densemixer_adapters` is the same command"
    if not file.exists():
        yield Check(name, "problem", f"{file} is gone: whoever uninstalls the original deletes it", fix)
    elif "densemixer_adapters" in file.read_text(errors="replace"):
        yield Check(name, "ok", str(file))
    else:
        yield Check(name, "problem", f"{file} is the original's, which was installed last", fix)


def _original(installed: dict[str, str]) -> Iterator[Check]:
    """Whether the original package is installed, and who imports it."""
    if ORIGINAL not in installed:
        return
    name = f"original {ORIGINAL}"
    fix = f"pip uninstall {ORIGINAL} && {_reinstall()} (the latter, as uninstalling deletes the command of both)"
    detail = f"{installed[ORIGINAL]} is installed beside {DISTRIBUTION}"
    spec = importlib.util.find_spec("usercustomize") if site.ENABLE_USER_SITE else None
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    if file is not None and re.search(rf"\bimport {ORIGINAL}\b", file.read_text(errors="replace")):
        detail += (
            f", and {file} imports it: {_boot.ENABLED}=1 switches both on, and then Qwen3-MoE, Qwen2-MoE and OLMoE "
            "can't be trained"
        )
        yield Check(name, "problem", detail, fix)
    else:
        detail += f"; only the latter is active, unless a program that runs with {_boot.ENABLED}=1 imports the original"
        yield Check(name, "note", detail, fix)


def check_environment(environ: Mapping[str, str]) -> Iterator[Check]:
    """What the variables say, read as they are where DenseMixer is on."""
    name = "environment"
    ours = sorted(variable for variable in environ if variable.startswith("DENSEMIXER_"))
    if not ours:
        yield Check(name, "ok", "no variable of DenseMixer is set")
        return
    try:
        from densemixer_adapters.environment import is_on, read_settings

        enabled = is_on(environ, _boot.ENABLED, False)
        is_on(environ, _boot.SWITCH, True)
        read_settings({**environ, _boot.ENABLED: "1"})
    except ImportError as error:
        yield Check(name, "note", f"{', '.join(ours)}: can't be checked ({error})")
        return
    except ValueError as error:
        yield Check(name, "problem", str(error), "correct or unset it")
        return
    values = ", ".join(f"{variable}={environ[variable]}" for variable in ours)
    if not environ.get(_boot.ENABLED, "0").strip():
        detail = f"{_boot.ENABLED} is set, but empty, and so switches nothing on"
        yield Check(name, "note", detail, f"export {_boot.ENABLED}=1, or unset it")
    elif not enabled and set(ours) - {_boot.ENABLED, _boot.SWITCH}:
        yield Check(name, "note", f"{values}: no effect without {_boot.ENABLED}=1", f"export {_boot.ENABLED}=1")
    else:
        yield Check(name, "ok", values)


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


def frameworks(installed: Mapping[str, str]) -> Iterator[Check]:
    """Each framework that we declare no version of, if it is installed."""
    for framework, versions in TESTED.items():
        if version := installed.get(framework):
            known = version in versions
            yield Check(framework, "ok" if known else "note", f"{version} (tested: {' and '.join(versions)})")


def _extras() -> set[str]:
    """The frameworks that an extra of this package installs."""
    try:
        extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {*map(canonicalize_name, extras)}


def _hooks(installed: dict[str, str]) -> Iterator[Check]:
    """Each module that we patch, if its framework is installed: whether this version has it."""
    for module in _boot.patches():
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
            ours = canonicalize_name(framework) in _extras()
            fix = f'pip install "{_source()}[{framework}]"' if ours else f"pip install --upgrade {distribution}"
            yield Check(f"hook {module}", "problem", detail, fix)
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
