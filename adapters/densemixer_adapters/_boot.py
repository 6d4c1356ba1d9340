"""Runs at every start of Python: puts a lazy import hook in place, so that a framework finds DenseMixer in itself.

Launchers start further processes (torchrun, Ray), so a patch made in one process doesn't reach the one that trains.
The wheel therefore ships ``densemixer.pth`` (Python 3.15 and later: ``densemixer.start``, PEP 829), which calls
`install` in each of them. Nothing but the standard library is imported, and nothing happens until one of the modules in
`PATCHES` is imported; then, right after its own code has run, its patch is applied to it.

To switch it off for a process and its children, set ``DENSEMIXER_BOOT=0`` before they start: that undoes all of it.
Patches hold for the life of a process.
"""

import os
import sys
from _thread import get_ident

TYPE_CHECKING = False  # neither `typing` nor `__future__` is worth its time at every start
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

PATCHES = {
    "axolotl.integrations.densemixer.plugin": "densemixer_adapters.axolotl:patch_densemixer_plugin",
    "axolotl.utils.config": "densemixer_adapters.axolotl_config:patch_config",
    "llamafactory.hparams.finetuning_args": "densemixer_adapters.llamafactory:patch_finetuning_args",
    "llamafactory.model.loader": "densemixer_adapters.llamafactory:patch_loader",
    "llamafactory.train.mca.workflow": "densemixer_adapters.llamafactory_megatron:patch_workflow",
    "llamafactory.v1.config.model_args": "densemixer_adapters.llamafactory:patch_v1_model_args",
    "llamafactory.v1.core.model_engine": "densemixer_adapters.llamafactory:patch_v1_model_engine",
    "mcore_adapter.models.model_config": "densemixer_adapters.llamafactory_megatron:patch_model_config",
    "megatron.core.distributed.distributed_data_parallel": "densemixer_adapters.megatron.metrics:patch_data_parallel",
    "megatron.core.models.hybrid.hybrid_model": "densemixer_adapters.megatron.config_field:patch_hybrid_model",
    "megatron.core.models.mamba.mamba_model": "densemixer_adapters.megatron.config_field:patch_hybrid_model",
    "megatron.core.transformer.moe.moe_logging": "densemixer_adapters.megatron.metrics:patch_moe_logging",
    "megatron.core.transformer.moe.moe_layer": "densemixer_adapters.megatron.config_field:patch_moe_layer",
    "megatron.core.transformer.moe.moe_utils": "densemixer_adapters.megatron.metrics:patch_moe_utils",
    "megatron.core.transformer.transformer_config": (
        "densemixer_adapters.megatron.config_field:patch_transformer_config"
    ),
    "nemo_automodel.components.config._arg_parser": "densemixer_adapters.automodel.door:patch_arg_parser",
    "nemo_automodel._transformers.auto_model": "densemixer_adapters.automodel.door:patch_auto_model",
    "verl.trainer.ppo.metric_utils": "densemixer_adapters.verl:patch_metric_utils",
    "verl.utils.config": "densemixer_adapters.verl:patch_config",
    "verl.workers.config.model": "densemixer_adapters.verl:patch_model_config",
    "verl.workers.engine.automodel.transformer_impl": "densemixer_adapters.automodel.verl_engine:patch_engine",
    "verl.workers.engine.base": "densemixer_adapters.verl:patch_engine_registry",
    "verl.workers.engine.fsdp.transformer_impl": "densemixer_adapters.verl_engines:patch_fsdp_engine",
    "verl.workers.engine.megatron.transformer_impl": "densemixer_adapters.verl:patch_megatron_engine",
    "verl.workers.engine.veomni.transformer_impl": "densemixer_adapters.verl_engines:patch_veomni_engine",
    "verl.workers.engine_workers": "densemixer_adapters.verl:patch_training_worker",
}
"""The exact name of a module, and the function that patches it."""

IN_SOME_VERSIONS = (
    "megatron.core.models.hybrid.hybrid_model",
    "megatron.core.transformer.moe.moe_logging",
)
"""Those of them that some versions of their framework, which we support, don't have."""

PATCHES_IF_ENABLED = {
    "densemixer.patching": "densemixer_adapters.original:warn_of_patches",
    "transformers.modeling_utils": "densemixer_adapters.environment:patch_modeling_utils",
    "transformers.trainer": "densemixer_adapters.callback:patch_trainer",
}
"""Those that are made only where the environment asks for DenseMixer in every program, as the module is imported."""

SWITCH = "DENSEMIXER_BOOT"
ENABLED = "DENSEMIXER_ENABLED"
OFF = ("0", "f", "false", "no", "off")
"""What switches a variable off, in any case."""

_taken: set[str] = set()
"""Names of modules that are patched, or will be as soon as their own code has run."""
_searches: set[tuple[str, int]] = set()
"""Names of modules that are being looked for, and the threads that look."""
_missed: set[str] = set()
"""Names of modules that were imported before the environment asked for their patch."""


def is_switched_off() -> bool:
    return _is_off(SWITCH, "1")


def _is_off(variable: str, default: str) -> bool:
    return (os.environ.get(variable, "").strip().lower() or default) in OFF


def enabled_unless_set() -> str:
    """The value of ``DENSEMIXER_ENABLED`` for a program that we start: 1, or what the user has set it to."""
    return os.environ.get(ENABLED, "").strip() or "1"


def is_live() -> bool:
    """Whether the hook is in place in this process."""
    return _Finder in sys.meta_path


def install() -> None:
    """Put the hook in place, once. Never raises."""
    if not is_switched_off() and not is_live():
        sys.meta_path.insert(0, _Finder)


def patches() -> "dict[str, str]":
    """Those that are wanted as the environment is now."""
    return PATCHES if _is_off(ENABLED, "0") else {**PATCHES, **PATCHES_IF_ENABLED}


def patch_imported() -> None:
    """Patch what was imported before the hook was in place: for frameworks that load us themselves. Never raises."""
    for name in patches() if is_live() else ():
        if name in sys.modules and name not in _taken:
            _taken.add(name)
            _missed.discard(name)
            _patch(sys.modules[name], name)


class _Finder:
    """First of the finders: lets the others find a module, and has it patched once its own code has run."""

    @classmethod
    def find_spec(cls, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        if _missed and not _is_off(ENABLED, "0"):
            _warn_of_missed()
        # Another hook that we ask may ask all finders in turn.
        search = name, get_ident()
        if not (name in PATCHES or name in PATCHES_IF_ENABLED) or search in _searches:
            return None
        if name not in patches():
            _missed.add(name)
            return None
        _searches.add(search)
        try:
            for finder in sys.meta_path:
                find = None if finder is cls else getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find and find(name, path, target)
                if spec is not None:
                    _patch_when_executed(spec.loader, name)
                    return spec
            return None
        finally:
            _searches.discard(search)


def _patch_when_executed(loader: "Any", name: str) -> None:
    """Shadow ``exec_module`` on this one loader, until it has run: the module keeps its own loader and spec."""
    run = getattr(loader, "exec_module", None)
    if run is None:
        return

    def exec_module(module: "ModuleType") -> None:
        vars(loader).pop("exec_module", None)  # gone already if another hook cleaned up
        run(module)
        _patch(module, name)

    _taken.add(name)
    try:
        loader.exec_module = exec_module
    except AttributeError as error:
        _warn(name, error)


def _patch(module: "ModuleType", name: str) -> None:
    from importlib import import_module

    try:
        patch, function = {**PATCHES, **PATCHES_IF_ENABLED}[name].split(":")
        getattr(import_module(patch), function)(module)
    except Exception as error:
        if name in PATCHES_IF_ENABLED:
            raise
        _warn(name, error)  # whoever doesn't use DenseMixer must not be stopped by it


def _warn_of_missed() -> None:
    imported = sorted(_missed & sys.modules.keys())
    _missed.clear()
    if imported:
        import logging

        logging.getLogger("densemixer").warning(
            "%s was set after %s had been imported. That is too late: models are trained without DenseMixer. Set it "
            "before the program imports anything of transformers, or start the program with it: %s=1 python ...",
            ENABLED,
            " and ".join(imported),
            ENABLED,
        )


def _warn(name: str, error: Exception) -> None:
    import logging

    logging.getLogger("densemixer").warning(
        "DenseMixer can't hook into %s (%s: %s), so it is not available here. `densemixer doctor` says which versions "
        "are supported; %s=0 in the environment switches the hooks off.",
        name,
        type(error).__name__,
        error,
        SWITCH,
    )
