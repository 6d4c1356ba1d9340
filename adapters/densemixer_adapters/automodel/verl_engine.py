"""verl's engine ``automodel``, by the same key as for FSDP (see `densemixer_adapters.verl`).

verl 0.9.1 works with Automodel 0.4.0, and with ``ep_size`` 1 has it load Qwen's and Llama's kin from transformers.

`patch_engine` is called by the boot hook (`densemixer_adapters._boot`), right after its module was imported.
"""

from __future__ import annotations

from typing import Any

from densemixer_adapters.automodel.attach import apply_densemixer
from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.switch import wrap
from densemixer_adapters.transformers import DenseMixerHandle
from densemixer_adapters.transformers.announce import describe
from densemixer_adapters.verl import SWITCH
from densemixer_adapters.verl_engines import asks_for_metrics, left_to_the_key, measured_step, wanted


def patch_engine(module: Any) -> None:
    """Attach DenseMixer to the model that the engine has built and spread; measure where it steps."""
    engine = module.AutomodelEngine

    @wrap(engine, "initialize")
    def initialize(original: Any, self: Any) -> None:
        with left_to_the_key(self):
            original(self)
        options = wanted(self)
        if options is None:
            return
        try:
            handle = apply_densemixer(self.module, options)
        except ValueError as error:
            raise type(error)(f"{SWITCH} for {self.model_config.path}: {error}") from None
        if isinstance(handle, DenseMixerHandle):
            if self.rank == 0:  # verl prints what it builds; its log level hides what isn't a warning
                print(describe(self.module, handle.layers))
            if asks_for_metrics(self):
                self._densemixer_metrics = RouterMetrics(handle.layers, self.module)

    wrap(engine, "optimizer_step")(measured_step)
