"""verl's SFT trainers, with torchrun and with Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

ON = "+model.override_config.densemixer={metrics:true}"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_rank(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from launch import sft

    folder = tmp_path_factory.mktemp("sft") / "run"
    save = ("trainer.save_freq=2", "checkpoint.save_contents=[model,hf_model]")
    return sft(folder, assets, ON, *save).check()


def test_gradients_equal_the_oracle(one_rank: Any) -> None:
    from engines import worst

    found = one_rank.recorded("actor")
    assert worst(found["gradients"], found["densemixer"]) < TOLERANCE
    assert worst(found["gradients"], found["conventional"], "mlp.gate") > 0.1


def test_router_metrics_are_logged_beside_verls(one_rank: Any) -> None:
    for step in one_rank.metrics:
        assert 0 < step["densemixer/router_grad_norm"] < step["train/grad_norm"]
        assert 0 < step["densemixer/router_grad_share_unselected"] < 1


def test_a_checkpoint_is_the_models_alone(one_rank: Any, assets: Path) -> None:
    from safetensors import safe_open

    (weights,) = one_rank.folder.glob("checkpoints/*/huggingface/model*.safetensors")
    with safe_open(weights, "pt") as saved, safe_open(assets / "model/model.safetensors", "pt") as original:
        assert set(saved.keys()) == set(original.keys())
    (shard,) = one_rank.folder.glob("checkpoints/*/model_world_size_1_rank_0.pt")
    assert not [name for name in torch.load(shard, weights_only=False) if "densemixer" in name]
    texts = list(one_rank.folder.glob("checkpoints/**/*.json"))
    assert any(path.name == "config.json" for path in texts)
    assert not [path for path in texts if "densemixer" in path.read_text()]


def test_switched_off_all_metrics_are_those_without_the_package(assets: Path, tmp_path: Path) -> None:
    """Here and not with PPO, whose metrics sum over a batch in the order in which its parts arrive."""
    from launch import sft, without_clocks

    off = sft(tmp_path / "off", assets).check()
    # As if the package weren't there: nothing of it can be imported.
    without = sft(tmp_path / "without", assets, DENSEMIXER_BOOT="0", WITHOUT_DENSEMIXER="1").check()
    assert len(off.metrics) == 2
    assert {"train/loss", "train/grad_norm"} <= without_clocks(off.metrics[0]).keys()
    assert [without_clocks(step) for step in off.metrics] == [without_clocks(step) for step in without.metrics]
    ours, theirs = off.recorded("actor")["gradients"], without.recorded("actor")["gradients"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_wrong_option_stops_the_run_at_its_start(assets: Path, tmp_path: Path) -> None:
    from launch import sft

    run = sft(tmp_path / "run", assets, "+model.override_config.densemixer={estimater:centered}")
    assert run.status != 0
    message = "override_config.densemixer: unknown option of DenseMixer: 'estimater'; did you mean 'estimator'?"
    assert message in run.output
    assert not (run.folder / "metrics.jsonl").exists()


def test_two_ranks_equal_one(assets: Path, tmp_path: Path, one_rank: Any) -> None:
    from engines import worst
    from launch import sft

    # No .pth file's hook here: the plugin's entry point alone.
    run = sft(tmp_path / "run", assets, ON, ranks=2, FIRST=not_installed()).check()
    found = run.recorded("actor")
    assert worst(found["gradients"], found["densemixer"]) < TOLERANCE
    for step, one in zip(run.metrics, one_rank.metrics, strict=True):
        for name in (
            "train/loss",
            "train/grad_norm",
            "densemixer/router_grad_norm",
            "densemixer/router_grad_share_unselected",
        ):
            assert step[name] == pytest.approx(one[name], rel=1e-4), name


def test_with_ray_and_external_lib_alone(assets: Path, tmp_path: Path) -> None:
    """The driver imports the library and builds the configuration; the workers get it by unpickling."""
    from engines import worst
    from launch import sft

    library = "model.external_lib=densemixer_adapters.verl"
    environment = {"FIRST": not_installed(), "VERL_USE_EXTERNAL_PLUGINS": "none"}
    run = sft(tmp_path / "run", assets, ON, library, ranks=2, ray=True, **environment).check()
    found = run.recorded("actor")
    assert worst(found["gradients"], found["densemixer"]) < TOLERANCE
    assert worst(found["gradients"], found["conventional"], "mlp.gate") > 0.1


def not_installed() -> str:
    return str(Path(__file__).parent / "support" / "not_installed")
