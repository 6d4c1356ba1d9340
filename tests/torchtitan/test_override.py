"""The override: by torchtitan's own configuration and command line, and the errors that they end in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchtitan", reason="needs torchtitan; run `nox -s torchtitan`")

import torch
import torch.distributed as dist
from conftest import EXAMPLE
from titan_model import SWITCH, initial_weights, load, step, trainer
from torchtitan.config import CompileConfig, DebugConfig

from densemixer_adapters.torchtitan import UnsupportedModelError, attached_handle, densemixer


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_it_does_and_what_it_leaves(tmp_path: Path) -> None:
    """Beside a run without it: names in checkpoints, optimizers and the loss are the same; other gradients aren't."""
    weights, found = initial_weights(), []
    for imports in ([], [(SWITCH, {"estimator": "centered"})], [SWITCH]):
        run = trainer(str(tmp_path), imports, backend="spmd_types")
        load(run.model_parts[0], weights)
        loss, gradients = step(run)
        names = list(run.model_parts[0].state_dict()), list(run.optimizers.state_dict())
        found.append(
            (loss, gradients, names, [layer.config.estimator for layer in attached_handle(run.model_parts).layers])
        )
        run.close()
    off, centered, default = found
    assert [estimators for *_, estimators in found] == [[], ["centered"] * 2, ["densemixer"] * 2]
    for loss, gradients, names, _ in (centered, default):
        assert torch.equal(loss, off[0])
        assert names == off[2]
        assert gradients.keys() == off[1].keys()
        for name, gradient in off[1].items():
            last = name.startswith(("lm_head", "norm", "layers.1.moe.routed_experts"))  # nothing reaches these
            assert torch.equal(gradients[name], gradient) == last, name
    router = "layers.1.moe.router.gate.weight"
    assert not torch.equal(centered[1][router], default[1][router])


def test_the_optimizers_keep_their_class() -> None:
    from torchtitan.components.optimizer import OptimizersContainer, default_adamw

    class Own(OptimizersContainer):
        pass

    config = densemixer(default_adamw(lr=2e-3), estimator="centered")
    assert issubclass(config._owner, OptimizersContainer)
    assert config.param_groups == default_adamw(lr=2e-3).param_groups
    assert config.to_dict()["densemixer"] == {"estimator": "centered"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "centred"}, "densemixer_adapters.torchtitan.densemixer: estimator must be one of.*centered"),
        ({"budgets": 0.5}, "densemixer_adapters.torchtitan.densemixer: unknown option of DenseMixer.*budget"),
        ({"metrics": True}, "metrics: router metrics don't get into torchtitan's log"),
        ({"layers": [2]}, r"layers=\(2,\): the model has 2"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(str(tmp_path), [(SWITCH, options)], backend="spmd_types")


def test_some_layers(tmp_path: Path) -> None:
    run = trainer(str(tmp_path), [(SWITCH, {"layers": "-1:"})], backend="spmd_types", checkpointing="full")
    assert [layer.name for layer in attached_handle(run.model_parts).layers] == ["layers.1.moe"]
    run.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": CompileConfig(enable=True)}, r"^layers\.0: .*compiled.*leave .model. out of compile.components"),
        (
            {"debug": DebugConfig(moe_force_load_balance=True, enable_structured_logging=False)},
            r"^layers\.0\.moe: .*moe_force_load_balance.*switch it off",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trainer(str(tmp_path), [SWITCH], backend="spmd_types", **settings)


def test_some_layers_of_a_pipeline(tmp_path: Path) -> None:
    """Positions count over the whole model, of which a stage has a part."""
    from tiny import model_spec

    from densemixer_adapters.torchtitan import apply_densemixer
    from densemixer_core import DenseMixerConfig

    stage = model_spec().model.build()
    del stage.layers["0"]
    for layers, attached_to in (([0], []), ([1], ["layers.1.moe"]), (":", ["layers.1.moe"])):
        with apply_densemixer([stage], DenseMixerConfig(layers=layers)) as handle:
            assert [layer.name for layer in handle.layers] == attached_to


def test_a_dense_model(tmp_path: Path) -> None:
    import torchtitan.models.qwen3 as qwen3

    with pytest.raises(UnsupportedModelError, match="Qwen3Model has no layer of torchtitan's class MoE"):
        trainer(str(tmp_path), [SWITCH], backend="spmd_types", spec=qwen3.model_registry("debugmodel"))


def test_the_example(tmp_path: Path) -> None:
    """torchtitan's program, with its command line, as examples/torchtitan/README.md has it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), *sys.path]), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    run(str(EXAMPLE / "make_tiny.py"))
    options = ["--module", "tiny", "--config", "moe", "--parallelism.expert_parallel_degree", "2"]
    options += ["--override.imports", SWITCH + '={"estimator": "centered", "budget": 0.25}']
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run(*torchrun, str(EXAMPLE / "without_gpu.py"), *options)
    assert "DenseMixer is attached to 2 layers of this rank's part of FSDPQwen3Model: estimator centered" in printed
    assert "step:  3" in printed
