#!/usr/bin/env bash
# GRPO with LoRA on attention and routers: the routers are what DenseMixer trains, so they must be among the targets.
#   bash lora.sh [more of verl's settings]
set -euo pipefail

"$(dirname "$0")/grpo.sh" \
  actor_rollout_ref.model.lora_rank=32 \
  actor_rollout_ref.model.lora_alpha=64 \
  'actor_rollout_ref.model.target_modules=[q_proj,k_proj,v_proj,o_proj]' \
  '+actor_rollout_ref.model.target_parameters=[mlp.gate.weight]' \
  actor_rollout_ref.model.lora.merge=True \
  actor_rollout_ref.actor.optim.lr=1e-5 \
  "$@"
