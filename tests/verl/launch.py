"""Runs verl's own entry points, with the CPU support of `support/`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
MODEL = "actor_rollout_ref.model"
TIMEOUT = 590  # a run takes about a minute on two idle cores

PPO = shlex.split(
    f"""
    data.train_batch_size=4 data.max_prompt_length=48 data.max_response_length=8 data.dataloader_num_workers=0
    data.filter_overlong_prompts=False data.shuffle=False
    {MODEL}.use_remove_padding=False +{MODEL}.override_config.attn_implementation=sdpa
    actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
    actor_rollout_ref.actor.use_torch_compile=False actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.ref.strategy=fsdp2 actor_rollout_ref.ref.fsdp_config.use_torch_compile=False
    actor_rollout_ref.ref.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.optim.lr=1e-2 actor_rollout_ref.actor.ppo_mini_batch_size=4
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001
    actor_rollout_ref.rollout.name=hf actor_rollout_ref.rollout.load_format=auto
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4
    reward.num_workers=1 reward.custom_reward_function.path={HERE}/support/rewards.py
    trainer.device=cpu trainer.nnodes=1 trainer.total_epochs=1 trainer.val_before_train=False trainer.test_freq=-1
    trainer.save_freq=-1 trainer.resume_mode=disable trainer.logger=[file]
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    ray_kwargs.ray_init.num_cpus=32 +ray_kwargs.ray_init.include_dashboard=False
"""
)
GRPO = shlex.split(
    """
    algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=4
"""
)
GAE = shlex.split(
    """
    algorithm.adv_estimator=gae actor_rollout_ref.rollout.n=1
    critic.strategy=fsdp2 critic.fsdp.model_dtype=fp32 critic.fsdp.use_torch_compile=False
    +critic.fsdp.mixed_precision.param_dtype=fp32
    critic.model.use_remove_padding=False +critic.model.override_config.attn_implementation=sdpa
    critic.ppo_micro_batch_size_per_gpu=2 critic.ppo_mini_batch_size=4 critic.optim.lr=1e-2
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2
"""
)
SFT = shlex.split(
    """
    data.train_batch_size=8 data.micro_batch_size_per_gpu=4 data.max_length=64 data.use_dynamic_bsz=False
    data.num_workers=0 data.pad_mode=no_padding data.messages_key=messages
    engine.strategy=fsdp2 engine.model_dtype=fp32 engine.use_torch_compile=False
    +engine.mixed_precision.param_dtype=fp32 optim.lr=1e-3
    model.use_remove_padding=False +model.override_config.attn_implementation=sdpa
    trainer.device=cpu trainer.nnodes=1 trainer.total_training_steps=2 trainer.total_epochs=1 trainer.logger=[file]
    trainer.save_freq=-1 trainer.test_freq=-1 trainer.resume_mode=disable
"""
)


class Run:
    """What a finished run left behind."""

    def __init__(self, folder: Path, status: int, output: str) -> None:
        self.folder, self.status, self.output = folder, status, output

    def check(self) -> Run:
        assert self.status == 0, self.output[-8000:]
        return self

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a step."""
        return [json.loads(line)["data"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def recorded(self, role: str) -> dict[str, dict[str, torch.Tensor]]:
        """Gradients by name: of the first step, and the oracle's."""
        found: dict[str, dict[str, torch.Tensor]] = torch.load(self.folder / f"{role}.pt")
        return found

    def rollouts(self, step: int = 1) -> list[tuple[str, str, float]]:
        """Prompts, responses and scores of a step, in order of themselves."""
        lines = (self.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()
        return sorted((row["input"], row["output"], row["score"]) for row in map(json.loads, lines))

    def lines(self, pattern: str) -> list[Any]:
        """The records in all files of a name."""
        files = sorted(self.folder.glob(pattern))
        assert files, f"nothing wrote {pattern}"
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def without_clocks(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics but those that are measured with a clock or depend on the rest of the machine."""
    timed = ("timing", "perf/", "mfu", "throughput")
    return {name: value for name, value in metrics.items() if not any(part in name for part in timed)}


def ppo(
    folder: Path, assets: Path, *settings: str, model: str = "model", ranks: int = 1, steps: int = 1, **env: str
) -> Run:
    """``verl.trainer.main_ppo`` on ``assets``."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # sockets have short paths
        arguments = [
            *PPO,
            f"data.train_files={assets}/sums.parquet",
            f"data.val_files={assets}/sums.parquet",
            f"{MODEL}.path={assets}/{model}",
            f"trainer.n_gpus_per_node={ranks}",
            f"trainer.total_training_steps={steps}",
            f"trainer.rollout_data_dir={folder}/rollouts",
            f"trainer.default_local_dir={folder}/checkpoints",
            f"+ray_kwargs.ray_init.num_gpus={ranks}",
            f"+ray_kwargs.ray_init._temp_dir={short}",
            f"hydra.run.dir={folder}/hydra",
            *settings,
        ]
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
        run = execute(folder, command, env)
        if run.status and "The current node timed out during startup" in run.output:
            # Ray gives its own processes 15 seconds to start, which a busy machine may not keep.
            shutil.rmtree(folder)
            run = execute(folder, command, env)
        return run


def sft(folder: Path, assets: Path, *settings: str, ranks: int = 1, ray: bool = False, **env: str) -> Run:
    """``verl.trainer.sft_trainer`` with torchrun, or ``sft_trainer_ray``, on ``assets``."""
    arguments = [
        *SFT,
        f"data.train_files={assets}/chats.parquet",
        "data.val_files=null",
        f"model.path={assets}/model",
        f"trainer.n_gpus_per_node={ranks}",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra",
        *settings,
    ]
    if ray:
        return execute(folder, [sys.executable, HERE / "support/sft_ray.py", *arguments], {"GPUS": str(ranks), **env})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return execute(folder, [*torchrun, "-m", "verl.trainer.sft_trainer", *arguments], env)


def torchrun(folder: Path, script: Path, *arguments: object, ranks: int, **env: str) -> Run:
    """A script of ours, with the same support."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return execute(folder, [*command, script, *arguments], env)


def execute(folder: Path, command: list[Any], env: dict[str, str]) -> Run:
    """In a process group of its own, none of which outlives the call."""
    folder.mkdir(parents=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DENSEMIXER_", "RAY_", "CUDA_"))},
        "PYTHONPATH": os.pathsep.join([*filter(None, [env.pop("FIRST", "")]), str(HERE / "support"), str(HERE.parent)]),
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform,hf_rollout,recorder",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # the engines are registered for CUDA and NPU
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "RECORDS": str(folder),
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "60",  # for a busy machine
        "RAY_worker_niceness": "0",  # else everything else on the machine goes first
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
        **env,
    }
    log = folder / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            cwd=folder,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            status = process.wait(TIMEOUT)
        finally:
            stop(process.pid, environment["RECORDS"])
    return Run(folder, status, log.read_text(errors="replace"))


def stop(group: int, records: str) -> None:
    """Kill what a run left: its process group, and Ray's daemons, which have groups of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    mark = f"RECORDS={records}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
