"""DenseMixer in LLaMA-Factory with ``USE_MCA=1``, where it trains with Megatron Core through ``mcore_adapter``.

The keys are those of `densemixer_adapters.llamafactory`. Only the model that a workflow loads for training is attached
to: DPO makes its reference model from a configuration. The functions ``patch_…`` are called by the boot hook
(`densemixer_adapters._boot`), each right after its module was imported.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import os
from typing import Any

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.environment import is_on, left_alone
from densemixer_adapters.megatron import FLAG, MegatronHandle, apply_densemixer
from densemixer_adapters.megatron.announce import warn_of_frozen_routers
from densemixer_adapters.switch import wrap
from densemixer_adapters.transformers import UnsupportedModelError
from densemixer_adapters.transformers.announce import show_log, warn
from densemixer_core import DenseMixerConfig

WORKFLOWS = ("run_pt", "run_sft", "run_dpo")


@dataclasses.dataclass
class _Run:
    """A workflow that runs with DenseMixer: its options, and what is attached as soon as the model is loaded."""

    config: DenseMixerConfig
    handle: MegatronHandle | None = None


_run: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("densemixer_run", default=None)


def patch_workflow(module: Any) -> None:
    """Attach DenseMixer to the models that LLaMA-Factory's workflows load, and log what their routers do."""
    for name in WORKFLOWS:
        wrap(module, name)(_run_workflow)
    wrap(module.AutoModel, "from_pretrained")(_load_and_attach)
    wrap(module, "_freeze_model_parameters")(_freeze_and_warn)
    for trainer in (module.CustomMcaTrainer, module.McaDPOTrainer):
        wrap(trainer, "log")(_log_with_metrics)


def patch_model_config(module: Any) -> None:
    """Keep our field out of the configurations in checkpoints: they are read without DenseMixer too, and where it is
    true, whoever reads them would have it switched on."""

    @wrap(module.PretrainedConfig, "to_json_string")
    def to_json_string(original: Any, self: Any) -> str:
        values = json.loads(original(self))
        values.pop(FLAG, None)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _run_workflow(
    original: Any, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, callbacks: Any = None
) -> Any:
    use = getattr(finetuning_args, "use_densemixer", None)
    if use is None and is_on(os.environ, ENABLED, False):
        warn(
            f"{ENABLED}=1 reaches models of transformers, and USE_MCA=1 trains one of Megatron Core: it trains without "
            "DenseMixer. Set use_densemixer: true in the YAML instead."
        )
    if use is not None and FLAG in (getattr(training_args, "additional_configs", None) or {}):
        raise ValueError(f"use_densemixer is set, and so is {FLAG} in additional_configs. Drop the latter.")
    token = _run.set(_Run(DenseMixerConfig.from_dict(finetuning_args.densemixer or {})) if use else None)
    try:
        with left_alone():  # a model of transformers is made for the collator alone
            return original(model_args, data_args, training_args, finetuning_args, callbacks)
    finally:
        _run.reset(token)


def _load_and_attach(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    models = original(cls, *args, **kwargs)
    run = _run.get()
    if run is not None:
        show_log(None)
        try:
            run.handle = apply_densemixer(models.get_models(), run.config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"use_densemixer: {error}") from None
        except ValueError as error:
            raise ValueError(f"densemixer: {error}") from None
    return models


def _freeze_and_warn(original: Any, model: Any, finetuning_args: Any) -> None:
    original(model, finetuning_args)
    run = _run.get()
    if run is not None and run.handle is not None:
        warn_of_frozen_routers(run.handle.layers, "In the YAML, set freeze_language_model: false.")


def _log_with_metrics(original: Any, self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    run = _run.get()
    if run is not None and run.config.metrics and run.handle is not None and "loss" in logs:  # of a step of training
        logs.update(run.handle.metrics())
    original(self, logs, *args, **kwargs)
