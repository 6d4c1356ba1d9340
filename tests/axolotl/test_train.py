"""``axolotl train``, with the plugin and without."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from programs import OF_ONE_STEP, Report, assert_only_the_routers_gradient_differs

Train = Callable[..., Report]
PYTHON = ("--launcher", "python")


@pytest.fixture(scope="module")
def plain(axolotl: Train) -> Report:
    return axolotl(*PYTHON, plugin=None, dense_mixer=None)


def test_full_fine_tuning(axolotl: Train, plain: Report) -> None:
    """The YAML of Axolotl's own plugin with one line changed, by its default launcher; and router metrics."""
    run = axolotl(dense_mixer={"metrics": True})
    assert_only_the_routers_gradient_differs(run, plain)
    assert len(re.findall(r"DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM", run.log)) == 1
    shares = re.findall(r"'densemixer/router_grad_share_unselected': '([0-9.]+)'", run.log)
    assert len(shares) == 2
    assert all(0 < float(share) < 1 for share in shares)
    assert "densemixer" not in plain.log.lower()


def test_no_means_no(axolotl: Train, plain: Report) -> None:
    run = axolotl(*PYTHON, dense_mixer=False, env={"DENSEMIXER_ENABLED": "1"})
    assert run.attached == 0
    assert run.losses == plain.losses


def test_the_environment_without_the_plugin(axolotl: Train, plain: Report) -> None:
    run = axolotl(*PYTHON, plugin=None, dense_mixer=None, env={"DENSEMIXER_ENABLED": "1"})
    assert_only_the_routers_gradient_differs(run, plain)
    assert run.log.count("DenseMixer is attached to 2 layers") == 1  # Axolotl drops what isn't said by its own loggers


LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
}


def test_lora_with_the_routers(axolotl: Train) -> None:
    run = axolotl(*PYTHON, dense_mixer=True, lora_modules_to_save=["mlp.gate"], **LORA)
    assert run.attached == 2
    assert "frozen" not in run.log
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert run.least_change > 1e-3


def test_the_example(tmp_path: Path, tiny: Path) -> None:
    """As its README says."""
    text = (EXAMPLES / "axolotl" / "README.md").read_text()
    first, command = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)[-1].splitlines()
    assert first == "python ../llamafactory/make_tiny.py tiny 128"
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "cpu.yaml").symlink_to(EXAMPLES / "axolotl" / "cpu.yaml")
    log = call(command.split(), tmp_path, Path(__file__).parent, AXOLOTL_DO_NOT_TRACK="1")
    assert log.count("DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM") == 1
    assert log.count("densemixer/router_grad_share_unselected") == 2
