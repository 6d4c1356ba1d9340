"""DenseMixer in open-instruct: ``python -m densemixer_adapters.open_instruct SCRIPT ARGUMENTS``.

Runs a script as ``python SCRIPT ARGUMENTS`` does, with ``DENSEMIXER_ENABLED=1``: each Mixture-of-Experts model that
transformers loads gets DenseMixer, with the options that the environment gives (`densemixer_adapters.environment`).
``DENSEMIXER_ENABLED=0`` is respected, for a run of the same command without. Launchers take it as a module:
``accelerate launch -m``, ``torchrun -m``, ``deepspeed --module``.

open-instruct's GRPO loads its models in Ray actors. These inherit the environment, and the start-up hook
(`densemixer_adapters._boot`) runs in them as in any process. Where Python runs no ``.pth`` files, Ray is made to set up
each of its workers instead.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

from densemixer_adapters import _boot

USAGE = """usage: python -m densemixer_adapters.open_instruct SCRIPT [ARGUMENTS]...

SCRIPT is a file, a module, or the name of a module of open_instruct, e.g. `finetune`, `dpo_tune_cache`, `grpo_fast`."""

OLMO_CORE = ("dpo", "grpo")
"""Scripts of open-instruct that train models of OLMo-core, besides those that are called ``olmo_core_…``."""

SETUP_HOOK = "worker_process_setup_hook"

logger = logging.getLogger("densemixer")


def main() -> None:
    """Run the script that the command line names, in this process.

    Raises:
        SystemExit: There is no such script, or DenseMixer can't work with it or as the environment says.
    """
    # `deepspeed --module` puts its --local_rank before the script.
    position = next((n for n, argument in enumerate(sys.argv) if n and not argument.startswith("-")), None)
    if position is None:
        sys.exit(USAGE)
    script, arguments = sys.argv[position], sys.argv[1:position] + sys.argv[position + 1 :]
    module, path = _find(script)
    if path.parent.name == "open_instruct" and (path.stem in OLMO_CORE or path.stem.startswith("olmo_core_")):
        _fail(
            f"{script} trains a model of OLMo-core, through which open-instruct can't load or export OLMoE: its "
            "converter doesn't know experts.gate_up_proj, which is what transformers 5 calls the weights. So there is "
            "nothing there that DenseMixer could train. Use finetune, dpo_tune_cache or grpo_fast."
        )
    _enable()
    sys.argv = [str(path), *arguments]
    if module is None:
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def setup_worker() -> None:
    """Put the start-up hook in place in this process, whatever it has imported before."""
    _boot.install()
    _boot.patch_imported()


def patch_ray(module: Any) -> None:
    """Have Ray call `setup_worker` in each worker of the job that ``ray.init`` starts."""
    from densemixer_adapters.switch import wrap

    @wrap(module, "init")
    def init(original: Any, *args: Any, **kwargs: Any) -> Any:
        environment = dict(kwargs.get("runtime_env") or {})
        if environment.setdefault(SETUP_HOOK, f"{__name__}.setup_worker") != f"{__name__}.setup_worker":
            logger.warning(
                "ray.init has a %s, and the .pth file of DenseMixer doesn't run in this environment, so models in "
                "Ray's workers are trained without DenseMixer unless that hook calls %s.setup_worker.",
                SETUP_HOOK,
                __name__,
            )
        return original(*args, **{**kwargs, "runtime_env": environment})


def _find(script: str) -> tuple[str | None, Path]:
    """The module, None for a file, and the file."""
    path = Path(script).absolute()
    if path.is_file():
        return None, path
    if not script.endswith(".py"):
        for name in (f"open_instruct.{script}", script):
            try:
                found = importlib.util.find_spec(name)
            except ModuleNotFoundError:  # of the package that it would be in
                continue
            if found is not None and found.origin is not None:
                return name, Path(found.origin)
    _fail(
        f"{script} is neither a file nor a module that can be imported. For the scripts of open-instruct, run this in "
        "a checkout of it, or install it."
    )


def _enable() -> None:
    if _boot.is_switched_off():
        _fail(f"{_boot.SWITCH}={os.environ[_boot.SWITCH]} switches all hooks off; unset it.")
    if not os.environ.get(_boot.ENABLED, "").strip():
        os.environ[_boot.ENABLED] = "1"
    if not _boot.is_live():
        _boot.PATCHES["ray"] = "densemixer_adapters.open_instruct:patch_ray"
    from densemixer_adapters.environment import read_settings

    try:
        read_settings()  # a wrong value is an error before data is prepared
    except ValueError as error:
        _fail(str(error))
    setup_worker()


def _fail(message: str) -> NoReturn:
    sys.exit(f"densemixer_adapters.open_instruct: {message}")


if __name__ == "__main__":
    main()
