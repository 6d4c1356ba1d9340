"""GRPO and PPO with verl's trainer, Ray workers, FSDP2 and weight sync; the rollout is `support/hf_rollout`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ACTOR = "+actor_rollout_ref.model.override_config.densemixer=true"
CRITIC = "+critic.model.override_config.densemixer={estimator:centered}"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ppo")


@pytest.fixture(scope="module")
def grpo_on(assets: Path, folder: Path) -> Any:
    from launch import GRPO, ppo

    # The .pth file's hook alone, without the plugin.
    return ppo(
        folder / "grpo-on", assets, *GRPO, ACTOR, model="half_dead", steps=2, VERL_USE_EXTERNAL_PLUGINS="none"
    ).check()


@pytest.fixture(scope="module")
def grpo_off(assets: Path, folder: Path) -> Any:
    from launch import GRPO, ppo

    return ppo(folder / "grpo-off", assets, *GRPO, model="half_dead").check()


@pytest.fixture(scope="module")
def grpo_lora(assets: Path, folder: Path) -> Any:
    """On routers, experts and attention; what is trained is merged for the rollout."""
    from launch import GRPO, MODEL, ppo

    lora = (
        f"{MODEL}.lora_rank=4",
        f"{MODEL}.lora_alpha=8",
        f"{MODEL}.target_modules=[q_proj,v_proj]",
        f"+{MODEL}.target_parameters=[mlp.gate.weight,experts.down_proj]",
        f"{MODEL}.lora.merge=True",
    )
    return ppo(folder / "grpo-lora", assets, *GRPO, *lora, ACTOR, model="half_dead", steps=2).check()


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


def rollouts(run: Any, step: int = 1) -> list[tuple[str, str, float]]:
    lines = (run.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()
    return sorted((row["input"], row["output"], row["score"]) for row in map(json.loads, lines))


def gates(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: gradient for name, gradient in gradients.items() if name.endswith("mlp.gate.weight")}


def test_the_first_rollout_and_losses_are_those_without(grpo_on: Any, grpo_off: Any) -> None:
    assert len({output for _, output, _ in rollouts(grpo_on)}) > 8
    assert rollouts(grpo_on) == rollouts(grpo_off)
    on, off = grpo_on.metrics[0], grpo_off.metrics[0]
    for name in ("actor/kl_loss", "actor/loss", "actor/pg_loss"):
        assert on[name] == pytest.approx(off[name], rel=1e-5, abs=1e-7), name
    assert on["actor/grad_norm"] != pytest.approx(off["actor/grad_norm"], rel=1e-2)


def test_grpo_gradients_equal_the_oracle(grpo_on: Any, grpo_off: Any) -> None:
    from engines import worst

    on, off = grpo_on.recorded("actor"), grpo_off.recorded("actor")
    assert worst(on["gradients"], on["densemixer"]) < TOLERANCE
    assert worst(off["gradients"], off["conventional"]) < TOLERANCE
    assert worst(gates(on["gradients"]), gates(off["gradients"])) > 0.1
    # The same batch: what one run's oracle says is what the other one's says.
    assert worst(off["densemixer"], on["densemixer"]) < TOLERANCE


def test_experts_that_are_never_selected_teach_the_router(grpo_on: Any, grpo_off: Any) -> None:
    from assets import REACHABLE

    for name, on in gates(grpo_on.recorded("actor")["gradients"]).items():
        off = grpo_off.recorded("actor")["gradients"][name]
        assert on[REACHABLE:].norm(dim=-1).min() > 1e-2 * on.norm(dim=-1).max()
        assert off[REACHABLE:].norm(dim=-1).max() < 1e-6 * off.norm(dim=-1).max()


def test_passes_without_gradients_run_no_operation_more(grpo_on: Any, grpo_off: Any) -> None:
    for role in ("actor", "reference"):
        on, off = grpo_on.lines(f"{role}-ops-*.jsonl"), grpo_off.lines(f"{role}-ops-*.jsonl")
        assert on[0] == off[0] > 0


def test_the_rollout_gets_the_same_weights_by_name(grpo_on: Any, grpo_off: Any) -> None:
    on, off = grpo_on.lines("sync-*.jsonl"), grpo_off.lines("sync-*.jsonl")
    assert len(on) == 3  # before the first step, and after each of the two
    assert all(list(sync.items()) == list(off[0].items()) for sync in [*on, *off])
    # What comes back is what was trained: the rollout's probabilities are the trainer's.
    assert max(step["training/rollout_probs_diff_max"] for step in grpo_on.metrics) < 1e-5


def test_lora_on_routers_and_experts(grpo_lora: Any, grpo_off: Any) -> None:
    from assets import make_model, make_tokenizer
    from engines import worst

    found = grpo_lora.recorded("actor")
    assert worst(found["gradients"], found["densemixer"]) < TOLERANCE
    assert worst(found["gradients"], found["conventional"], "mlp.gate") > 0.1
    # LoRA starts as the model itself.
    assert rollouts(grpo_lora) == rollouts(grpo_off)
    # What the rollout gets is the model with LoRA merged: verl sends it in bfloat16, under the model's own names.
    names = make_model(make_tokenizer()).state_dict().keys()
    synced = grpo_lora.lines("sync-*.jsonl")
    assert len(synced) == 3
    assert all(sync.keys() == names for sync in synced)
    assert max(step["training/rollout_probs_diff_mean"] for step in grpo_lora.metrics) < 1e-3


def test_router_metrics_are_logged_for_each_role(grpo_on: Any, ppo_on: Any, ppo_off: Any) -> None:
    for run, role in ((grpo_on, "actor"), (ppo_on, "actor"), (ppo_on, "critic")):
        for step in run.metrics:
            assert 0 < step[f"{role}/densemixer/router_grad_norm"] < step[f"{role}/grad_norm"]
            assert 0 < step[f"{role}/densemixer/router_grad_share_unselected"] < 1
    assert not [name for name in ppo_off.metrics[0] if "densemixer" in name]


@pytest.mark.parametrize(("role", "estimator"), [("actor", "densemixer"), ("critic", "centered")])
def test_ppo_on_two_ranks_equals_the_oracle_on_one(role: str, estimator: str, ppo_on: Any, ppo_off: Any) -> None:
    from engines import worst

    assert rollouts(ppo_on) == rollouts(ppo_off)
    two, one = ppo_on.recorded(role), ppo_off.recorded(role)
    assert worst(two["gradients"], two[estimator]) < TOLERANCE
    assert worst(two["gradients"], one[estimator]) < 10 * TOLERANCE  # advantages differ by rounding
    assert worst(one["gradients"], one["conventional"]) < TOLERANCE
    assert worst(gates(two["gradients"]), gates(one["gradients"])) > 0.1


def test_the_first_losses_of_ppo_are_those_without(ppo_on: Any, ppo_off: Any) -> None:
    on, off = ppo_on.metrics[0], ppo_off.metrics[0]
    for name in ("actor/pg_loss", "critic/vf_loss", "critic/vpred_mean"):
        assert on[name] == pytest.approx(off[name], rel=1e-4, abs=1e-6), name


def test_checkpoints_are_those_of_the_model_alone(ppo_on: Any) -> None:
    configs = list(ppo_on.folder.glob("checkpoints/**/config.json"))
    assert {"actor", "critic"} <= {part for path in configs for part in path.parts}
    assert not [path for path in ppo_on.folder.glob("checkpoints/**/*.json") if "densemixer" in path.read_text()]


def test_switched_off_all_metrics_are_those_without_the_package(assets: Path, folder: Path) -> None:
    """Byte for byte, with batches of one: verl sums over larger ones in the order in which their parts arrive."""
    from launch import ppo, without_clocks

    one = (
        "data.train_batch_size=1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=1",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "critic.ppo_mini_batch_size=1",
        "critic.ppo_micro_batch_size_per_gpu=1",
    )
    as_if_not_installed = {"DENSEMIXER_BOOT": "0", "WITHOUT_DENSEMIXER": "1"}
    off = ppo(folder / "off", assets, *critic(assets), *one, steps=2).check()
    without = ppo(folder / "without", assets, *critic(assets), *one, steps=2, **as_if_not_installed).check()
    assert all(len(without_clocks(step)) > 40 for step in off.metrics)
    assert list(map(without_clocks, off.metrics)) == list(map(without_clocks, without.metrics))
    assert [rollouts(off, step) for step in (1, 2)] == [rollouts(without, step) for step in (1, 2)]


def test_a_wrong_option_stops_the_run_at_its_start(assets: Path, tmp_path: Path) -> None:
    from launch import GRPO, ppo

    wrong = "+actor_rollout_ref.model.override_config.densemixer={estimater:centered}"
    run = ppo(tmp_path / "run", assets, *GRPO, wrong)
    assert run.status != 0
    assert (
        "override_config.densemixer: unknown option of DenseMixer: 'estimater'; did you mean 'estimator'?" in run.output
    )
    assert not (run.folder / "rollouts").exists()
