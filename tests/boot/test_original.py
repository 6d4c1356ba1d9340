"""The original package `densemixer` 1.0.1 in the same environment."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from installs import Environment, run

pytest.importorskip("typer", reason="needs typer, which the package requires; install it with pip")

OURS = ("-m", "densemixer_adapters")


@pytest.fixture
def both(tmp_path: Path, wheel: Path) -> Environment:
    """An environment with our package, for a test that adds the original. It has a user's site, as setup needs."""
    environment = Environment.create(tmp_path / "both")
    settings = environment.folder / "pyvenv.cfg"
    settings.write_text(settings.read_text().replace("system-site-packages = false", "system-site-packages = true"))
    environment.install(wheel)
    environment.borrow()
    return environment


def doctor(environment: Environment, **variables: str) -> dict[str, dict[str, str]]:
    done = environment.run(environment.python, *OURS, "doctor", "--json", **variables)
    return {check["name"]: check for check in json.loads(done.stdout[done.stdout.index("[\n") :])}


@pytest.mark.parametrize("ours_last", [False, True])
def test_our_command_survives_the_original(both: Environment, wheel: Path, original: Path, ours_last: bool) -> None:
    """Installing either takes the command, and uninstalling the original deletes it: doctor's line mends both."""
    command = both.scripts / "densemixer"
    assert doctor(both)["command densemixer"]["state"] == "ok"
    both.install(original)
    if ours_last:
        both.install(wheel, "--force-reinstall")
    checks = doctor(both)
    assert ("densemixer_adapters" in command.read_text()) == ours_last
    assert checks["command densemixer"]["state"] == ("ok" if ours_last else "problem")
    assert checks["original densemixer"]["state"] == "note"
    assert "only the latter is active" in checks["original densemixer"]["detail"]
    assert checks["original densemixer"]["fix"].startswith("pip uninstall densemixer && pip install --force-reinstall")

    both.uninstall("densemixer")
    assert not command.exists()
    checks = doctor(both)
    assert "original densemixer" not in checks
    assert checks["command densemixer"]["state"] == "problem"
    line, _, same = checks["command densemixer"]["fix"].partition("; ")
    assert same == "`python -m densemixer_adapters` is the same command"
    pip, *arguments = shlex.split(line)
    assert pip == "pip"
    run([sys.executable, "-m", "pip", "--python", both.python, *arguments, "--no-index"]).check_returncode()
    assert doctor(both)["command densemixer"]["state"] == "ok"
    assert both.run(command, "--help").returncode == 0


def test_python_m_is_the_command(full: Environment) -> None:
    assert full.run(full.python, *OURS, "setup").stdout.startswith("Nothing to set up")
    assert full.run(full.python, *OURS, "nonsense").returncode == 2


MODEL = """
import torch, transformers
options = dict(vocab_size=64, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1)
options |= dict(num_attention_heads=2, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2)
"""
LOAD = """
for kind in ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral"):
    try:
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options))
        print("loaded", kind)
    except ValueError as error:
        print("refused", kind, error)
"""
BY_HAND = """
from densemixer_adapters.transformers import apply_densemixer
for kind in ("Qwen3Moe", "Mixtral"):
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
    try:
        print("attached", kind, len(apply_densemixer(model).layers))
    except ValueError as error:
        print("refused", kind, error)
"""


def results(output: str) -> list[str]:
    """Without what is logged: the original sends what the logger `densemixer` logs to standard output."""
    return [line for line in output.splitlines() if line.startswith(("loaded", "attached", "refused"))]


def test_both_switched_on(both: Environment, original: Path, tmp_path: Path) -> None:
    """By the original's own `densemixer setup`. Each class that it patches is refused by name, and no other one."""
    both.install(original)
    users = {"PYTHONUSERBASE": str(tmp_path / "user")}
    assert "auto-import added" in both.run(both.scripts / "densemixer", "setup", **users).stdout
    (file,) = (tmp_path / "user").rglob("usercustomize.py")

    check = doctor(both, **users)["original densemixer"]
    assert check["state"] == "problem"
    assert f"1.0.1 is installed beside densemixer-adapters, and {file} imports it" in check["detail"]
    assert "DENSEMIXER_ENABLED=1 switches both on" in check["detail"]

    done = both.run(both.python, "-c", MODEL + LOAD, **users, DENSEMIXER_ENABLED="1")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(
        "DENSEMIXER_ENABLED=1 switches on both densemixer-adapters and the original package"
    ) == 1
    *refused, last = results(done.stdout)
    blocks = ("Qwen3MoeSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "OlmoeSparseMoeBlock")
    for result, block in zip(refused, blocks, strict=True):
        assert result.startswith("refused")
        assert f"({block}): the original package `densemixer` has been imported in this process" in result
        assert "pip uninstall densemixer" in result
    assert last == "loaded mixtral"


def test_the_original_alone_is_left_to_itself(both: Environment, original: Path, tmp_path: Path) -> None:
    """Installed and switched off, it patches nothing, and nothing is refused."""
    both.install(original)
    done = both.run(both.python, "-c", "import densemixer" + MODEL + BY_HAND)
    assert results(done.stdout) == ["attached Qwen3Moe 1", "attached Mixtral 1"], done.stderr


def test_patched_by_a_program_and_attached_by_hand(both: Environment, original: Path) -> None:
    both.install(original)
    patch = "from densemixer.patching import apply_qwen3_moe_patch; apply_qwen3_moe_patch()"
    done = both.run(both.python, "-c", patch + MODEL + BY_HAND)
    assert done.returncode == 0, done.stderr
    refused, attached = results(done.stdout)
    assert refused.startswith("refused Qwen3Moe model.layers.0.mlp (Qwen3MoeSparseMoeBlock): the original package")
    assert attached == "attached Mixtral 1"
