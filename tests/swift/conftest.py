from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from installs import is_installed
from programs import EXAMPLES, Report, make_tiny, train

Train = Callable[..., Report]
# Sums of gradients, at a rate that moves a row by more than a thousandth.
SGD = "--optim sgd --lr_scheduler_type constant --warmup_ratio 0 --max_grad_norm 0 --weight_decay 0 --learning_rate 0.5"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not is_installed("ms-swift"):
        pytest.skip("needs ms-swift 4.6; run `nox -s swift`")
    return make_tiny(tmp_path_factory.mktemp("swift") / "tiny")


@pytest.fixture(scope="session")
def swift(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``swift sft`` and others, with one of the example's YAMLs and the probe."""

    def run(command: str, yaml: str, *options: str, **environment: str) -> Report:
        folder = tmp_path_factory.mktemp("run")
        text = (EXAMPLES / "ms_swift" / yaml).read_text()
        (folder / "my.yaml").write_text(text.split("\n\n", 1)[1])  # without what it sets in the environment
        plugin = Path(__file__).parent / "probe_plugin.py"
        tiny_options = (tiny / "swift").read_text().split()
        end = ["--external_plugins", str(plugin), "--callbacks", "probe"]
        arguments = ["swift", command, "my.yaml", *tiny_options, *SGD.split(), *options, *end]
        return train(arguments, folder, Path(__file__).parent, MODELSCOPE_CACHE=str(folder / "cache"), **environment)

    return run
