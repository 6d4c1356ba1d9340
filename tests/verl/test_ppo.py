"""PPO with a critic: verl's trainer, Ray workers, FSDP2 and weight sync; the rollout is `support/hf_rollout`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ACTOR = "+actor_rollout_ref.model.override_config.densemixer={metrics:true}"
CRITIC = "+critic.model.override_config.densemixer={estimator:centered,metrics:true}"
ROUTER = "mlp.gate"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ppo")


def run(folder: Path, assets: Path, *settings: str, **more: Any) -> Any:
    """Of an actor half of whose experts can't be selected."""
    from launch import GAE, ppo

    critic = (f"critic.model.path={assets}/critic", f"critic.model.tokenizer_path={assets}/critic")
    return ppo(folder, assets, *GAE, *critic, *settings, model="half_dead", **more).check()


@pytest.fixture(scope="module")
def ppo_on(assets: Path, folder: Path) -> Any:
    """On two ranks, by the .pth file's hook alone, without the plugin."""
    save = ("trainer.save_freq=1", "critic.checkpoint.save_contents=[model,hf_model]")
    return run(folder / "ppo-on", assets, ACTOR, CRITIC, *save, ranks=2, VERL_USE_EXTERNAL_PLUGINS="none")


@pytest.fixture(scope="module")
def ppo_off(assets: Path, folder: Path) -> Any:
    return run(folder / "ppo-off", assets)


@pytest.mark.parametrize(("role", "estimator"), [("actor", "densemixer"), ("critic", "centered")])
def test_ppo_on_two_ranks_equals_the_oracle_on_one(role: str, estimator: str, ppo_on: Any, ppo_off: Any) -> None:
    from engines import worst

    two, one = ppo_on.recorded(role), ppo_off.recorded(role)
    assert worst(two["gradients"], two[estimator]) < TOLERANCE
    assert worst(two["gradients"], one[estimator]) < 10 * TOLERANCE  # advantages differ by rounding
    assert worst(one["gradients"], one["conventional"]) < TOLERANCE
    assert worst(two["gradients"], one["gradients"], ROUTER) > 0.1


def test_experts_that_are_never_selected_teach_the_router(ppo_on: Any, ppo_off: Any) -> None:
    from tiny_models import REACHABLE

    gradients, without = ppo_on.recorded("actor")["gradients"], ppo_off.recorded("actor")["gradients"]
    routers = [name for name in gradients if ROUTER in name]
    assert len(routers) == 2
    for on, off in ((gradients[name], without[name]) for name in routers):
        assert on[REACHABLE:].norm(dim=-1).min() > 1e-2 * on.norm(dim=-1).max()
        assert off[REACHABLE:].norm(dim=-1).max() < 1e-6 * off.norm(dim=-1).max()


def test_the_first_rollout_and_losses_are_those_without(ppo_on: Any, ppo_off: Any) -> None:
    assert len({output for _, output, _ in ppo_on.rollouts()}) > 2
    assert ppo_on.rollouts() == ppo_off.rollouts()
    on, off = ppo_on.metrics[0], ppo_off.metrics[0]
    for name in ("actor/kl_loss", "actor/pg_loss", "critic/vf_loss", "critic/vpred_mean"):
        assert on[name] == pytest.approx(off[name], rel=1e-4, abs=1e-6), name
    assert on["actor/grad_norm"] != pytest.approx(off["actor/grad_norm"], rel=1e-2)


def test_the_rollout_gets_the_same_weights_by_name(ppo_on: Any, ppo_off: Any) -> None:
    on, off = ppo_on.lines("sync-*.jsonl"), ppo_off.lines("sync-*.jsonl")
    assert len(on) == 2 * len(off) == 4  # for each of the ranks, before and after the step
    assert all(list(sync.items()) == list(off[0].items()) for sync in [*on, *off])
    # What comes back is what was trained: the rollout's probabilities are the trainer's.
    assert max(step["training/rollout_probs_diff_max"] for step in ppo_on.metrics) < 1e-5


def test_checkpoints_are_those_of_the_model_alone(ppo_on: Any) -> None:
    configs = list(ppo_on.folder.glob("checkpoints/**/config.json"))
    assert {"actor", "critic"} <= {part for path in configs for part in path.parts}
    assert not [path for path in ppo_on.folder.glob("checkpoints/**/*.json") if "densemixer" in path.read_text()]


def test_router_metrics_are_logged_for_each_role(ppo_on: Any, ppo_off: Any) -> None:
    for role in ("actor", "critic"):
        for step in ppo_on.metrics:
            assert 0 < step[f"{role}/densemixer/router_grad_norm"] < step[f"{role}/grad_norm"]
            assert 0 < step[f"{role}/densemixer/router_grad_share_unselected"] < 1
    assert not [name for name in ppo_off.metrics[0] if "densemixer" in name]
