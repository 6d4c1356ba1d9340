"""verl's engine ``automodel``, by the same key as for FSDP (see `densemixer_adapters.verl`).

verl 0.9.1 works with Automodel 0.4.0, and with ``ep_size`` 1 has it load Qwen's and Llama's kin from transformers.

`patch_engine` is called by the boot hook (`densemixer_adapters._boot`), right after its module was imported.
"""

from __future__ import annotations

import math
from typing import Any

from densemixer_adapters.automodel.attach import apply_densemixer
from densemixer_adapters.environment import left_alone
from densemixer_adapters.metrics.router_metrics import RouterMetrics, UnmeasuredError, warn_unmeasured
from densemixer_adapters.switch import wrap
from densemixer_adapters.transformers import DenseMixerHandle
from densemixer_adapters.transformers.announce import describe
from densemixer_adapters.verl import SWITCH, _value, read_options


def patch_engine(module: Any) -> None:
    """Attach DenseMixer to the model that the engine has built and spread; measure where it steps."""
    engine = module.AutomodelEngine

    @wrap(engine, "initialize")
    def initialize(original: Any, self: Any) -> None:
        override = getattr(self.model_config, "override_config", None) or {}
        # A reference policy is built from the actor's configuration, but only ever runs forward.
        options = None if self.engine_config.forward_only else read_options(override)
        with left_alone(_value(override) is not None):
            original(self)
        if options is None:
            return
        try:
            handle = apply_densemixer(self.module, options)
        except ValueError as error:
            raise type(error)(f"{SWITCH} for {self.model_config.path}: {error}") from None
        if isinstance(handle, DenseMixerHandle):
            if self.rank == 0:  # verl prints what it builds; its log level hides what isn't a warning
                print(describe(self.module, handle.layers))
            if options.metrics:
                self._densemixer_metrics = RouterMetrics(handle.layers, self.module)

    @wrap(engine, "optimizer_step")
    def optimizer_step(original: Any, self: Any) -> Any:
        metrics: RouterMetrics | None = getattr(self, "_densemixer_metrics", None)
        if metrics is None:
            return original(self)
        metrics.before_update(self.optimizer)
        norm = original(self)
        metrics.after_update(skipped=not math.isfinite(norm))
        try:
            self._densemixer_measured = metrics.measure()
        except UnmeasuredError as error:
            metrics.remove()
            self._densemixer_metrics, self._densemixer_measured = None, {}
            warn_unmeasured(error)
        return norm
