"""Runs LLaMA-Factory's workflows for Megatron Core, one after the other, in this process or on the ranks of torchrun.
Usage: train_megatron.py REPORT RUNS, where RUNS is a JSON file: for each name the content of a YAML.

It takes ``mcore_adapter`` from where Python finds it: a checkout of it, or the stand-in. The report is JSON, of rank 0:
for each run its log, or the error that stopped it, our messages, and to how many layers of each model DenseMixer is
attached.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import cpu
import torch

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ.update({"USE_MCA": "1", **ALONE, **os.environ})

# Megatron seeds the GPU's generator, and keeps its states.
torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
torch.cuda.set_rng_state = lambda *args: None
torch.cuda.manual_seed = lambda *args: None

import torch.distributed as dist  # noqa: E402
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.train import mca  # noqa: E402
from llamafactory.train.mca import workflow  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.language_module.language_module import LanguageModule  # noqa: E402
from transformers import modeling_utils  # noqa: E402

from densemixer_adapters.environment import patch_modeling_utils  # noqa: E402
from densemixer_adapters.megatron import attached_handle  # noqa: E402
from densemixer_adapters.switch import wrap  # noqa: E402

patch_modeling_utils(modeling_utils)  # as the start-up hook does it where the environment asks for DenseMixer
logging.getLogger("densemixer").setLevel(logging.INFO)


@wrap(LanguageModule, "compute_language_model_loss")
def compute_language_model_loss(original: Any, self: Any, labels: Any, logits: Any) -> Any:
    """Megatron's loss writes into float32 logits, which autograd refuses after mcore_adapter's hook on them."""
    return original(self, labels, logits.clone())


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """One workflow."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("densemixer").addHandler(handler)
    os.environ.update(settings.pop("environment", {}))
    trainers: list[Any] = []
    for name in ("CustomMcaTrainer", "McaDPOTrainer"):
        setattr(workflow, name, _recorded(getattr(workflow, name), trainers))
    found: dict[str, Any] = {"messages": messages}
    try:
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(settings)
        getattr(mca, f"run_{finetuning_args.stage}")(model_args, data_args, training_args, finetuning_args, [])
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    for trainer in trainers:
        models = {"model": trainer.model, "reference": getattr(trainer, "ref_model", None)}
        found["attached"] = {
            name: len(attached_handle(model.get_models()).layers) for name, model in models.items() if model is not None
        }
        found["log"] = trainer.state.log_history
    logging.getLogger("densemixer").removeHandler(handler)
    os.environ.pop("DENSEMIXER_ENABLED", None)
    return found


def _recorded(trainer: type, made: list[Any]) -> Any:
    """What makes such a trainer, and keeps it."""
    original = getattr(trainer, "original", trainer)

    def make(**arguments: Any) -> Any:
        made.append(original(**arguments))
        return made[-1]

    make.original = original  # type: ignore[attr-defined]
    return make


def main(report: Path, runs: Path) -> None:
    if os.environ["WORLD_SIZE"] == "1":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    else:  # mcore_adapter makes the groups that the YAML asks for
        dist.init_process_group("gloo")
    with cpu.CudaIsCpu():
        found = {name: run(each) for name, each in json.loads(runs.read_text()).items()}
    if dist.get_rank() == 0:
        report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
