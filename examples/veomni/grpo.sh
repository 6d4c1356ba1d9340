#!/usr/bin/env bash
# GRPO of Qwen3-30B-A3B on GSM8K with verl's engine `veomni`: 8 GPUs of 80 GB, experts spread over all, rollouts with vLLM.
#   bash grpo.sh [more of verl's settings]
# The data: verl's examples/data_preprocess/gsm8k.py.
set -euo pipefail
data=${DATA:-$HOME/data/gsm8k}

python3 -m verl.trainer.main_ppo \
  model_engine=veomni \
  +actor_rollout_ref.model.override_config.densemixer=true \
  algorithm.adv_estimator=grpo \
  data.train_files="$data/train.parquet" \
  data.val_files="$data/test.parquet" \
  data.train_batch_size=128 \
  data.max_prompt_length=512 \
  data.max_response_length=1024 \
  actor_rollout_ref.model.path=Qwen/Qwen3-30B-A3B \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.actor.veomni.expert_parallel_size=8 \
  actor_rollout_ref.actor.veomni.moe_implementation=fused_triton \
  actor_rollout_ref.actor.veomni.mixed_precision=True \
  actor_rollout_ref.actor.veomni.param_offload=True \
  actor_rollout_ref.actor.veomni.optimizer_offload=True \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192 \
  actor_rollout_ref.actor.use_kl_loss=True \
  actor_rollout_ref.actor.kl_loss_coef=0.001 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=4 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
  trainer.n_gpus_per_node=8 \
  trainer.nnodes=1 \
  trainer.total_epochs=1 \
  trainer.save_freq=20 \
  trainer.test_freq=20 \
  trainer.project_name=densemixer \
  trainer.experiment_name=qwen3-30b-a3b-grpo-veomni \
  "$@"
