"""Axolotl's kernels for experts, as far as a CPU goes: not the kernels, but what they do with LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer


def test_lora_on_experts_that_a_kernel_computes_apart(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its effect is still zero, so the experts' output doesn't tell. transformers' products stand in for the kernel."""
    from axolotl.integrations.kernels.libs.scattermoe_lora.experts_lora_fastpath import patch_paramwrapper_fastpath
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper
    from transformers import AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    monkeypatch.setattr(ParamWrapper, "forward", ParamWrapper.forward)  # as it was, afterwards
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "scattermoe", batched_mm_experts_forward)
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names, modules_to_save=["mlp.gate"])
    model = get_peft_model(model, config).train()
    ids = torch.arange(20)[None]

    with apply_densemixer(model):
        model(input_ids=ids, labels=ids).loss.backward()  # by PEFT's own way

    patch_paramwrapper_fastpath()
    model.config._experts_implementation = "scattermoe"
    model(input_ids=ids, labels=ids).loss.backward()
    with apply_densemixer(model), pytest.raises(UnsupportedModelError, match=r"LoRA on `\w+`.*drop use_scattermoe"):
        model(input_ids=ids, labels=ids)
