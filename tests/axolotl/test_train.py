"""``axolotl train``, with the plugin and without."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import OF_ONE_STEP, Report, assert_only_the_routers_gradient_differs, call, read, start, train

HERE = Path(__file__).parent
PLUGIN = "densemixer_adapters.axolotl.DenseMixerPlugin"
PROBE = "probe_plugin.ProbePlugin"
WITHOUT: dict[str, Any] = {"plugins": [PROBE], "dense_mixer": None}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_modules_to_save": ["mlp.gate"],
}
ENABLED: dict[str, dict[str, Any]] = {
    "without the plugin": WITHOUT,
    "no": {"plugins": [PLUGIN, PROBE], "dense_mixer": False},
    "LoRA": {"plugins": [PLUGIN, PROBE], "dense_mixer": {"estimator": "densemixer"}, **LORA},
}
"""What is trained under DENSEMIXER_ENABLED=1."""

Configure = Callable[..., Path]


@pytest.fixture(scope="module")
def plain(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("plain")
    configure(folder, **WITHOUT)
    return train(["axolotl", "train", "my.yaml", "--launcher", "python"], folder, HERE, AXOLOTL_DO_NOT_TRACK="1")


@pytest.fixture(scope="module")
def enabled(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    folders = {name: tmp_path_factory.mktemp("enabled") for name in ENABLED}
    for name, keys in ENABLED.items():
        configure(folders[name], **keys)
    variables = {"AXOLOTL_DO_NOT_TRACK": "1", "AXOLOTL_TEE_STDOUT": "0", "DENSEMIXER_ENABLED": "1"}
    log = call([sys.executable, HERE / "many.py", *folders.values()], HERE, HERE, **variables)
    return {name: read(folder / "report.json", (folder / "log").read_text() + log) for name, folder in folders.items()}


def test_full_fine_tuning(configure: Configure, plain: Report, tmp_path: Path) -> None:
    """The YAML of Axolotl's own plugin with one line changed, by its default launcher; and router metrics."""
    configure(tmp_path, plugins=[PLUGIN, PROBE])
    run = train(["axolotl", "train", "my.yaml"], tmp_path, HERE, AXOLOTL_DO_NOT_TRACK="1")
    assert_only_the_routers_gradient_differs(run, plain)
    assert len(re.findall(r"DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM", run.log)) == 1
    shares = re.findall(r"'densemixer/router_grad_share_unselected': '([0-9.]+)'", run.log)
    assert len(shares) == 2
    assert all(0 < float(share) < 1 for share in shares)
    assert "densemixer" not in plain.log.lower()


def test_two_processes(configure: Configure, tmp_path: Path) -> None:
    """By torchrun, each with its share of the batch: Axolotl puts models on GPUs then, unless they fit elsewhere."""
    configure(tmp_path, plugins=[PLUGIN, PROBE], max_memory={"cpu": "4GiB"})
    torchrun = ["--launcher", "torchrun", "--", "--nproc_per_node=2", "--standalone"]
    run = train(["axolotl", "train", "my.yaml", *torchrun], tmp_path, HERE, AXOLOTL_DO_NOT_TRACK="1")
    assert (run.attached, run.ranks, run.apart) == (2, 2, 0)
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert run.never > 20
    assert run.typical_change > 1e-3


def test_the_key_that_no_plugin_reads(configure: Configure, tmp_path: Path) -> None:
    configure(tmp_path, plugins=[PROBE])
    done = start(["axolotl", "train", "my.yaml"], tmp_path, HERE, AXOLOTL_DO_NOT_TRACK="1")
    assert done.returncode != 0
    message = (
        f"dense_mixer: none of the YAML's plugins reads it, so Axolotl would train without DenseMixer. Add {PLUGIN}"
    )
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_environment_without_the_plugin(enabled: dict[str, Report], plain: Report) -> None:
    run = enabled["without the plugin"]
    assert_only_the_routers_gradient_differs(run, plain)
    assert run.log.count("DenseMixer is attached to 2 layers of Qwen3Moe") == 1  # Axolotl drops what isn't its own


def test_no_means_no(enabled: dict[str, Report], plain: Report) -> None:
    assert enabled["no"].attached == 0
    assert enabled["no"].losses == plain.losses


def test_lora_with_the_routers(enabled: dict[str, Report]) -> None:
    run = enabled["LoRA"]
    assert run.attached == 2
    assert "frozen" not in run.log
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert run.typical_change > 1e-3
