#!/usr/bin/env bash
# SFT of Qwen3-30B-A3B on conversations, whose router learns from all experts: 8 GPUs of 80 GB, FSDP2.
#   bash sft.sh [more of verl's settings]
# The data: a parquet file with a column `messages`, e.g. of verl's examples/data_preprocess/gsm8k_multiturn_sft.py.
set -euo pipefail
data=${DATA:-$HOME/data/gsm8k_sft}

torchrun --standalone --nproc-per-node="${GPUS:-8}" -m verl.trainer.sft_trainer \
  +model.override_config.densemixer=true \
  data.train_files="$data/train.parquet" \
  data.val_files="$data/test.parquet" \
  data.messages_key=messages \
  data.train_batch_size=64 \
  data.max_length=4096 \
  data.use_dynamic_bsz=True \
  data.max_token_len_per_gpu=8192 \
  model.path=Qwen/Qwen3-30B-A3B \
  engine.strategy=fsdp2 \
  engine.param_offload=True \
  engine.optimizer_offload=True \
  optim.lr=1e-5 \
  trainer.n_gpus_per_node="${GPUS:-8}" \
  trainer.total_epochs=1 \
  trainer.save_freq=after_each_epoch \
  trainer.project_name=densemixer \
  trainer.experiment_name=qwen3-30b-a3b-sft \
  "$@"
