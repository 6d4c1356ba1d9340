"""Test support: runs ``verl.trainer.sft_trainer_ray`` unchanged, on a Ray with a declared number of GPUs."""

import functools
import os
import runpy

import ray

ray.init = functools.partial(ray.init, num_gpus=int(os.environ["GPUS"]), num_cpus=32, include_dashboard=False)
runpy.run_module("verl.trainer.sft_trainer_ray", run_name="__main__", alter_sys=True)
