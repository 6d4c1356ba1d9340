"""PPO with a critic, run like GRPO in `test_grpo`."""

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


def critic(assets: Path) -> list[str]:
    from launch import GAE

    return [*GAE, f"critic.model.path={assets}/critic", f"critic.model.tokenizer_path={assets}/critic"]


@pytest.fixture(scope="module")
def ppo_on(assets: Path, folder: Path) -> Any:
    """On two ranks."""
    from launch import ppo

    save = ("trainer.save_freq=1", "critic.checkpoint.save_contents=[model,hf_model]")
    return ppo(folder / "ppo-on", assets, *critic(assets), ACTOR, CRITIC, *save, ranks=2).check()


@pytest.fixture(scope="module")
def ppo_off(assets: Path, folder: Path) -> Any:
    from launch import ppo

    return ppo(folder / "ppo-off", assets, *critic(assets)).check()


@pytest.mark.parametrize(("role", "estimator"), [("actor", "densemixer"), ("critic", "centered")])
def test_ppo_on_two_ranks_equals_the_oracle_on_one(role: str, estimator: str, ppo_on: Any, ppo_off: Any) -> None:
    from engines import worst

    assert ppo_on.rollouts() == ppo_off.rollouts()
    two, one = ppo_on.recorded(role), ppo_off.recorded(role)
    assert worst(two["gradients"], two[estimator]) < TOLERANCE
    assert worst(two["gradients"], one[estimator]) < 10 * TOLERANCE  # advantages differ by rounding
    assert worst(one["gradients"], one["conventional"]) < TOLERANCE
    assert worst(two["gradients"], one["gradients"], ROUTER) > 0.1


def test_the_first_losses_of_ppo_are_those_without(ppo_on: Any, ppo_off: Any) -> None:
    on, off = ppo_on.metrics[0], ppo_off.metrics[0]
    for name in ("actor/pg_loss", "critic/vf_loss", "critic/vpred_mean"):
        assert on[name] == pytest.approx(off[name], rel=1e-4, abs=1e-6), name


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
