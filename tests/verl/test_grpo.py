"""GRPO, run as `test_ppo` runs PPO, with LoRA on routers, experts and attention, which is merged for the rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROUTER = "mlp.gate"


@pytest.fixture(scope="module")
def grpo(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from launch import GRPO, MODEL, ppo

    lora = (
        f"{MODEL}.lora_rank=4",
        f"{MODEL}.lora_alpha=8",
        f"{MODEL}.target_modules=[q_proj,v_proj]",
        f"+{MODEL}.target_parameters=[mlp.gate.weight,experts.down_proj]",
        f"{MODEL}.lora.merge=True",
    )
    on = f"+{MODEL}.override_config.densemixer={{metrics:true}}"
    folder = tmp_path_factory.mktemp("grpo") / "run"
    return ppo(folder, assets, *GRPO, *lora, on, model="half_dead", steps=2).check()


def test_grpo_gradients_equal_the_oracle(grpo: Any) -> None:
    from engines import worst

    found = grpo.recorded("actor")
    assert worst(found["gradients"], found["densemixer"]) < 1e-5
    assert worst(found["gradients"], found["conventional"], ROUTER) > 0.1


def test_the_rollout_gets_the_model_with_lora_merged(grpo: Any) -> None:
    """verl sends it in bfloat16, under the model's own names."""
    from assets import make_model, make_tokenizer

    assert len({output for _, output, _ in grpo.rollouts()}) > 8
    names = make_model(make_tokenizer()).state_dict().keys()
    synced = grpo.lines("sync-*.jsonl")
    assert len(synced) == 3  # before the first step, and after each of the two
    assert all(sync.keys() == names for sync in synced)
    assert max(step["training/rollout_probs_diff_mean"] for step in grpo.metrics) < 1e-3


def test_router_metrics_are_logged(grpo: Any) -> None:
    for step in grpo.metrics:
        assert 0 < step["actor/densemixer/router_grad_norm"] < step["actor/grad_norm"]
        assert 0 < step["actor/densemixer/router_grad_share_unselected"] < 1
