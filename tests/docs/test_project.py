"""What a maintained project has: the release, the workflows and the hooks say what is true of the others."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pages import REPOSITORY

GITHUB = REPOSITORY / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((GITHUB / "workflows").glob("*.yml"))}
RELEASE = WORKFLOWS["release"]
ON = True
"""YAML's word for the key `on`."""


def steps(job: dict[str, Any]) -> list[str]:
    """What a job's steps run or use, in their order."""
    return [step.get("run") or step["uses"] for step in job["steps"]]


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", REPOSITORY / "ci" / "release.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_same_everywhere(release: ModuleType) -> None:
    assert release.disagreements(f"v{release.version()}") == []


def test_another_tag_is_refused(release: ModuleType) -> None:
    assert release.disagreements("v0.0.0") == [f"the tag says v0.0.0, pyproject.toml v{release.version()}"]


def test_the_tag_of_this_version_publishes_and_others_do_not(release: ModuleType) -> None:
    """A pattern of GitHub: a dot is a dot, and `[0-9]+` what it is in a regular expression."""
    (pattern,) = RELEASE[ON]["push"]["tags"]
    assert RELEASE[ON].keys() == {"push"}
    assert RELEASE[ON]["push"].keys() == {"tags"}
    regex = re.compile(pattern.replace(".", r"\."))
    assert regex.fullmatch(f"v{release.version()}")
    for other in ("main", "v1", "0.2.0", "v0.2.0-rc1", "v0x2x0"):
        assert not regex.fullmatch(other)


def test_nothing_is_published_that_was_not_checked() -> None:
    build, publish = RELEASE["jobs"]["build"], RELEASE["jobs"]["publish"]
    order = ("ci/release.py", "-m build", "twine check --strict", "pytest tests/packaging", "upload-artifact")
    places = [next(n for n, step in enumerate(steps(build)) if part in step) for part in order]
    assert places == sorted(places)
    assert publish["needs"] == "build"
    download, upload = steps(publish)
    assert "download-artifact" in download
    assert "pypa/gh-action-pypi-publish" in upload
    sent, received = build["steps"][-1]["with"], publish["steps"][0]["with"]
    assert (sent["name"], sent["path"]) == (received["name"], received["path"])


def test_only_the_job_that_publishes_has_an_identity_and_none_a_secret() -> None:
    assert RELEASE["permissions"] == {}
    assert RELEASE["jobs"]["build"]["permissions"] == {"contents": "read"}
    assert RELEASE["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert RELEASE["jobs"]["publish"]["environment"] == "pypi"
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_what_is_there(name: str) -> None:
    noxfile = (REPOSITORY / "ci" / "noxfile.py").read_text()
    for job in WORKFLOWS[name]["jobs"].values():
        for step in job["steps"]:
            assert step.keys() & {"run", "uses"}
            if "uses" in step:
                assert re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d+|release/v\d+)", step["uses"])
            for path in re.findall(r"(?<![\w/])(?:\.ci|ci|tests)/[\w./-]*\w", step.get("run", "")):
                assert (REPOSITORY / path).exists(), path
            for session in re.findall(r"--session \"?(\w+)", step.get("run", "")):
                assert f"\ndef {session}(" in noxfile, session


def test_the_newest_of_each_framework_is_tried() -> None:
    job = WORKFLOWS["newest"]["jobs"]["newest"]
    noxfile = (REPOSITORY / "ci" / "noxfile.py").read_text()
    (table,) = re.findall(r"^NEWEST = \{\n(.*?)^\}", noxfile, flags=re.MULTILINE | re.DOTALL)
    assert job["strategy"]["matrix"]["framework"] == re.findall(r'^    "(\w+)": ', table, flags=re.MULTILINE)
    assert job["strategy"]["fail-fast"] is False
    assert WORKFLOWS["newest"][ON]["schedule"]


@pytest.mark.parametrize("path", [*sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))], ids=lambda path: path.stem)
def test_issue_forms_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form.keys() == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= form.keys()
    identities = [field["id"] for field in form["body"]]
    assert len(identities) == len(set(identities))
    for field in form["body"]:
        assert field["type"] in ("input", "textarea")
        assert field["attributes"]["label"]


def test_the_hook_before_a_commit_is_the_session_lint() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (hook,) = (hook for repository in config["repos"] for hook in repository["hooks"])
    assert hook["entry"].split()[-2:] == ["--session", "lint"]
    assert "ci/noxfile.py" in hook["entry"]


def test_the_citation_is_whole() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()


def test_dependabot_renews_what_is_there() -> None:
    config = yaml.safe_load((GITHUB / "dependabot.yml").read_text())
    assert config["version"] == 2
    assert [update["package-ecosystem"] for update in config["updates"]] == ["github-actions"]
