#!/usr/bin/env bash
# PPO of Qwen3-30B-A3B on GSM8K, actor and critic with routers that learn from all experts: 16 GPUs of 80 GB, FSDP2, vLLM.
#   bash ppo.sh [more of verl's settings]
# The data: verl's examples/data_preprocess/gsm8k.py.
set -euo pipefail
data=${DATA:-$HOME/data/gsm8k}

python3 -m verl.trainer.main_ppo \
  +actor_rollout_ref.model.override_config.densemixer=true \
  +critic.model.override_config.densemixer=true \
  algorithm.adv_estimator=gae \
  data.train_files="$data/train.parquet" \
  data.val_files="$data/test.parquet" \
  data.train_batch_size=512 \
  data.max_prompt_length=512 \
  data.max_response_length=1024 \
  actor_rollout_ref.model.path=Qwen/Qwen3-30B-A3B \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.fsdp_config.param_offload=True \
  actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=128 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=1 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=4 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
  critic.strategy=fsdp2 \
  critic.model.path=Qwen/Qwen3-30B-A3B \
  critic.fsdp.param_offload=True \
  critic.fsdp.optimizer_offload=True \
  critic.optim.lr=1e-5 \
  critic.ppo_mini_batch_size=128 \
  critic.use_dynamic_bsz=True \
  critic.ppo_max_token_len_per_gpu=8192 \
  trainer.n_gpus_per_node=8 \
  trainer.nnodes=2 \
  trainer.total_epochs=1 \
  trainer.save_freq=20 \
  trainer.test_freq=20 \
  trainer.project_name=densemixer \
  trainer.experiment_name=qwen3-30b-a3b-ppo \
  "$@"
