"""Quantised models: what the libraries quantise, what trains there, and what is refused.

Quantised attention has no simple oracle. So each layer's input and the gradient of its output are taken from the run,
and the router's gradient is compared with the oracle of that layer alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers
from families import FAMILIES, IMPLEMENTATIONS, Family
from living import living_bytes
from lora import effective_block, wrapped
from packaging.version import Version
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from runs import gradients, loss_of, selections
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_core import DenseMixerConfig


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


bitsandbytes = needs("bitsandbytes")
torchao = needs("torchao")
BITS = [4, 8]


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Saves a family's model and loads it as users do, with a quantisation config."""

    def load(
        family: str, quantization: Any, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32
    ) -> Any:
        FAMILIES[family].build().save_pretrained(tmp_path)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantization, experts_implementation=implementation, dtype=dtype
        )

    return load


def bnb(bits: int) -> Any:
    return transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def ao_experts(config: Any) -> Any:
    """A configuration of torchao for the stacked experts, which none of its defaults reaches."""
    from torchao.quantization import FqnToConfig

    return transformers.TorchAoConfig(FqnToConfig({r"re:.*\.experts\.(gate_up|down)_proj": config}))


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2)


def experts_in_4_bit(family: Family, model: nn.Module) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for block in family.blocks(model):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(block.experts, name)


@contextlib.contextmanager
def seen_by_layers(family: Family, model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Each layer's input x and the gradient g of its output, in one forward and backward."""
    seen: list[dict[str, Tensor]] = []

    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        of_layer = {"x": args[0].detach().flatten(0, -2)}
        seen.append(of_layer)
        output = output[0] if isinstance(output, tuple) else output
        output.register_hook(lambda g: of_layer.update(g=g.flatten(0, -2)))

    hooks = [block.register_forward_hook(hook) for block in family.blocks(model)]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def oracle_of_router(
    family: Family, block: Any, seen: dict[str, Tensor], index: Tensor, estimator: str
) -> tuple[Tensor, ...]:
    """The gradients of what trains in a layer's router."""
    plain, x = effective_block(family, block), seen["x"].double()
    with oracle.Float64():
        y = oracle.densemixer(x, family.logits(plain, x), index, family.formula(plain), estimator)
    return torch.autograd.grad(y, trained(getattr(block, family.router)), seen["g"].double())


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def assert_routers_learn_as_the_oracle(family: Family, model: Any, estimator: str = "densemixer") -> None:
    with (
        apply_densemixer(model, DenseMixerConfig(estimator)),
        selections(family, model) as indices,
        seen_by_layers(family, model) as seen,
    ):
        gradients(model)
    for block, *of_layer in zip(family.blocks(model), seen, indices, strict=True):
        ours = [p.grad for p in trained(getattr(block, family.router))]
        truth = oracle_of_router(family, block, *of_layer, estimator)
        conventional = oracle_of_router(family, block, *of_layer, "conventional")
        assert ours
        for found, expected, without in zip(ours, truth, conventional, strict=True):
            assert oracle.worst_error(found, expected) <= 1e-5
            assert oracle.relative_error(without, expected) > 0.05


@bitsandbytes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_bitsandbytes_leaves_routers_and_stacked_experts_alone(family: str, bits: int, load: Any) -> None:
    import bitsandbytes

    of, kind = FAMILIES[family], bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    model = load(family, bnb(bits))
    quantised = {name for name, module in model.named_modules() if isinstance(module, kind)}
    linear = {name for name, module in of.build().named_modules() if isinstance(module, nn.Linear)}
    assert quantised == linear - {"lm_head"}
    assert "model.layers.0.self_attn.o_proj" in quantised
    assert ("model.layers.0.mlp.shared_expert.down_proj" in quantised) == (family == "qwen2_moe")
    for block in of.blocks(model):
        stacked = [*block.experts.parameters(), *getattr(block, of.router).parameters()]
        assert {p.dtype for p in stacked} == {torch.float32}


@bitsandbytes
@pytest.mark.parametrize("router", ["modules_to_save", "target_parameters"])
@pytest.mark.parametrize("on", ["attention", "experts"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_qlora(family: str, bits: int, on: str, router: str, load: Any) -> None:
    of = FAMILIES[family]
    model = wrapped(of, load(family, bnb(bits)), on, router)
    assert_routers_learn_as_the_oracle(of, model)
    assert any("lora_" in name and p.grad is not None for name, p in model.named_parameters())


@bitsandbytes
def test_preparing_for_k_bit_training_makes_experts_float32(load: Any) -> None:
    """PEFT's function casts all that isn't quantised, so nearly all of the model."""
    of = FAMILIES["qwen3_moe"]
    model = load("qwen3_moe", bnb(4), dtype=torch.bfloat16)
    assert of.blocks(model)[0].experts.down_proj.dtype == torch.bfloat16
    prepare_model_for_kbit_training(model)
    assert of.blocks(model)[0].experts.down_proj.dtype == torch.float32


@bitsandbytes
@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_in_4_bit(family: str, implementation: str, estimator: str) -> None:
    """Nothing in transformers does this, but a function of bitsandbytes can."""
    of = FAMILIES[family]
    model = of.build(implementation)
    experts_in_4_bit(of, model)
    assert_routers_learn_as_the_oracle(of, wrapped(of, model, "attention", "modules_to_save"), estimator)


@bitsandbytes
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapters_on_experts_in_4_bit(implementation: str) -> None:
    """PEFT finds them by their full names only."""
    of = FAMILIES["qwen3_moe"]
    model = of.build(implementation)
    experts_in_4_bit(of, model)
    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=4, init_lora_weights=False, target_parameters=names, modules_to_save=["mlp.gate"])
    peft_model = get_peft_model(model, config)
    if Version("0.21") <= Version(peft.__version__):
        with pytest.warns(UserWarning, match="Could not find any LoRA parametrization"):
            loss_of(peft_model)
        pytest.skip(
            "PEFT 0.21 doesn't take the adapter off 4-bit weights after a forward, so the next one adds it twice"
        )
    assert_routers_learn_as_the_oracle(of, peft_model)
    assert sum("lora_" in name and p.grad is not None for name, p in peft_model.named_parameters()) == 8


@torchao
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_torchao_int8(family: str, load: Any) -> None:
    """Of itself it quantises linear layers only."""
    of = FAMILIES[family]
    model = load(family, transformers.TorchAoConfig(int8()))
    quantised = {name for name, p in model.named_parameters() if type(p).__name__ == "Int8Tensor"}
    assert quantised == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert_routers_learn_as_the_oracle(of, wrapped(of, model, "attention", "modules_to_save"))


@torchao
@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_torchao_experts_in_int8(estimator: str, load: Any) -> None:
    of = FAMILIES["qwen3_moe"]
    model = load("qwen3_moe", ao_experts(int8()), "eager")
    assert {type(block.experts.gate_up_proj).__name__ for block in of.blocks(model)} == {"Int8Tensor"}
    assert_routers_learn_as_the_oracle(of, wrapped(of, model, "attention", "modules_to_save"), estimator)


@torchao
@pytest.mark.parametrize(
    ("implementation", "on"), [("batched_mm", "attention"), ("grouped_mm", "attention"), ("eager", "experts")]
)
def test_torchao_has_no_kernels_for_others_nor_for_adapters(implementation: str, on: str, load: Any) -> None:
    """Not ours to refuse: it says so without DenseMixer."""
    of = FAMILIES["qwen3_moe"]
    model = wrapped(of, load("qwen3_moe", ao_experts(int8()), implementation), on, "modules_to_save")
    with pytest.raises(NotImplementedError, match="Int8Tensor dispatch: attempting to run unimplemented operator"):
        loss_of(model)


def int8_activations() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(version=2)


def float8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


@torchao
@pytest.mark.parametrize("config", [int8_activations, float8])
def test_torchao_other_experts_are_refused(config: Any, load: Any) -> None:
    model = load("qwen3_moe", ao_experts(config()), "eager")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp .*`gate_up_proj` is quantised by torchao"):
        apply_densemixer(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_fp8_experts_are_refused() -> None:
    try:
        from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    except ModuleNotFoundError as error:
        pytest.skip(f"transformers {transformers.__version__} has them with triton only: {error}")

    config = FAMILIES["qwen3_moe"].build().config
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    model = replace_with_fp8_linear(model, quantization_config=transformers.FineGrainedFP8Config())
    with pytest.raises(UnsupportedModelError, match=r"\(FP8Experts\), `gate_up_proj` is quantised.*dequantize=True"):
        apply_densemixer(model)


def test_mxfp4_experts_are_refused() -> None:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = FAMILIES["gpt_oss"].build()
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp .*\(Mxfp4GptOssExperts\) don't hold stacked weights"
    ):
        apply_densemixer(model)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("library", "implementation"),
    [
        *(pytest.param("bitsandbytes", i, marks=bitsandbytes) for i in IMPLEMENTATIONS),
        pytest.param("torchao", "eager", marks=torchao),
    ],
)
def test_no_dequantised_experts_live_until_the_backward(
    library: str, implementation: str, checkpointed: bool, load: Any
) -> None:
    """None that conventional training doesn't keep there, too; with gradient checkpointing, none at all."""
    of = FAMILIES["qwen3_moe"]
    if library == "torchao":
        model = load("qwen3_moe", ao_experts(int8()), implementation)
    else:
        model = of.build(implementation)
        experts_in_4_bit(of, model)
    dequantised = sum(p.nbytes for p in of.build().model.layers[0].mlp.experts.parameters())
    model = wrapped(of, model, "attention", "modules_to_save").train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    conventional = living_bytes(lambda: loss_of(model))
    with apply_densemixer(model) as handle:
        ours = living_bytes(lambda: loss_of(model))
    tokens, experts, k = 24, 8, 2
    assert 0 <= ours - conventional <= len(handle.layers) * tokens * (experts + 1 + k) * 4 < dequantised / 10
    if checkpointed:
        assert ours < dequantised / 2
