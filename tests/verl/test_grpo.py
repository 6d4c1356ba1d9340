"""GRPO with verl's trainer, Ray workers, FSDP2 and weight sync; the rollout is `support/hf_rollout`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ACTOR = "+actor_rollout_ref.model.override_config.densemixer={metrics:true}"
ROUTER = "mlp.gate"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo")


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


def test_the_first_rollout_and_losses_are_those_without(grpo_on: Any, grpo_off: Any) -> None:
    assert len({output for _, output, _ in grpo_on.rollouts()}) > 8
    assert grpo_on.rollouts() == grpo_off.rollouts()
    on, off = grpo_on.metrics[0], grpo_off.metrics[0]
    for name in ("actor/kl_loss", "actor/loss", "actor/pg_loss"):
        assert on[name] == pytest.approx(off[name], rel=1e-5, abs=1e-7), name
    assert on["actor/grad_norm"] != pytest.approx(off["actor/grad_norm"], rel=1e-2)


def test_grpo_gradients_equal_the_oracle(grpo_on: Any, grpo_off: Any) -> None:
    from engines import worst

    on, off = grpo_on.recorded("actor"), grpo_off.recorded("actor")
    assert worst(on["gradients"], on["densemixer"]) < TOLERANCE
    assert worst(off["gradients"], off["conventional"]) < TOLERANCE
    assert worst(on["gradients"], off["gradients"], ROUTER) > 0.1
    # The same batch: what one run's oracle says is what the other one's says.
    assert worst(off["densemixer"], on["densemixer"]) < TOLERANCE


def test_experts_that_are_never_selected_teach_the_router(grpo_on: Any, grpo_off: Any) -> None:
    from assets import REACHABLE

    gradients, without = grpo_on.recorded("actor")["gradients"], grpo_off.recorded("actor")["gradients"]
    routers = [name for name in gradients if ROUTER in name]
    assert len(routers) == 2
    for on, off in ((gradients[name], without[name]) for name in routers):
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
    assert worst(found["gradients"], found["conventional"], ROUTER) > 0.1
    # LoRA starts as the model itself.
    assert grpo_lora.rollouts() == grpo_off.rollouts()
    # What the rollout gets is the model with LoRA merged: verl sends it in bfloat16, under the model's own names.
    names = make_model(make_tokenizer()).state_dict().keys()
    synced = grpo_lora.lines("sync-*.jsonl")
    assert len(synced) == 3
    assert all(sync.keys() == names for sync in synced)
    assert max(step["training/rollout_probs_diff_mean"] for step in grpo_lora.metrics) < 1e-3


def test_router_metrics_are_logged(grpo_on: Any, grpo_off: Any) -> None:
    for step in grpo_on.metrics:
        assert 0 < step["actor/densemixer/router_grad_norm"] < step["actor/grad_norm"]
        assert 0 < step["actor/densemixer/router_grad_share_unselected"] < 1
    assert not [name for name in grpo_off.metrics[0] if "densemixer" in name]
