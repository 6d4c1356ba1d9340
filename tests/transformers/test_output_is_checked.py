"""Experts whose output isn't the weighted sum of what their weights compute: an error, from the first batch on.

And no error where it is that sum but for rounding, or where nobody can say.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
from families import IMPLEMENTATIONS
from formulas import FORMULAS
from oracle import assert_close
from single import HIDDEN, Single, run, tokens
from sweep import step
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]
FOLDERS = ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "lfm2_moe"]
OFTEN = 64
"""Training forwards of a layer, within which a change that nothing shows is found."""

FLOAT32_ONLY = {"inkling2", "inkling2_loop", "qwen3_omni_moe"}
"""Whose host adds tensors of other dtypes, and fails in bfloat16."""


def mismatch() -> Any:
    from densemixer_adapters.transformers.checks import OutputMismatchError

    assert issubclass(OutputMismatchError, RuntimeError)
    return OutputMismatchError


def refused(layer: Single) -> Any:
    """The error that names the layer, and the output as what differs."""
    name = next(name for name, module in layer.model.named_modules() if module is layer.block)
    return pytest.raises(mismatch(), match=rf"(?s){re.escape(name)}\b.*output")


def wrapped_forward(experts: Any) -> None:
    forward = experts.forward
    experts.forward = lambda *args, **kwargs: 0.5 * forward(*args, **kwargs)


def scaling_hook(experts: nn.Module) -> None:
    experts.register_forward_hook(lambda module, args, output: 0.5 * output, prepend=True)


def adapter_beside(experts: Any) -> None:
    """As adapters for experts are often written: on top of the original forward, with the same input."""
    torch.manual_seed(0)
    adapter = nn.Linear(HIDDEN, HIDDEN, bias=False).requires_grad_(False)
    forward = experts.forward
    experts.forward = lambda x, index, weights: forward(x, index, weights) + 0.1 * adapter(x)


def adapter_in_a_hook(experts: nn.Module) -> None:
    torch.manual_seed(0)
    adapter = nn.Linear(HIDDEN, HIDDEN, bias=False).requires_grad_(False)
    experts.register_forward_hook(lambda module, args, output: output + 0.1 * adapter(args[0]), prepend=True)


CHANGES = [wrapped_forward, scaling_hook, adapter_beside, adapter_in_a_hook]
Change = Callable[[Any], None]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_in_the_first_forward(folder: str, estimator: str, change: Change) -> None:
    layer = Single(folder)
    x, g = tokens(24)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        change(layer.block.experts)
        with torch.no_grad():
            run(layer.block, x)  # not a training forward
        for _ in range(2):
            with refused(layer):
                run(layer.block, x)
    run(layer.block, x).backward(g)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", [wrapped_forward, adapter_beside])
def test_what_was_there_before_attaching(change: Change, implementation: str) -> None:
    layer = Single("qwen3_moe", implementation)
    change(layer.block.experts)
    with apply_densemixer(layer.model), refused(layer):
        run(layer.block, tokens(24)[0])


@pytest.mark.parametrize("change", CHANGES)
def test_in_the_first_forward_with_tokens(change: Change) -> None:
    layer = Single("qwen3_moe", "grouped_mm")
    x, _ = tokens(24)
    with apply_densemixer(layer.model):
        change(layer.block.experts)
        run(layer.block, x[:, :0])
        with refused(layer):
            run(layer.block, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("change", CHANGES)
def test_in_every_dtype(change: Change, dtype: torch.dtype) -> None:
    layer = Single("qwen3_moe")
    layer.model.to(dtype)
    with apply_densemixer(layer.model):
        wanted = layer.block.experts
        if dtype != torch.float64 and "adapter" in change.__name__:
            pytest.skip("the adapter is in float32")
        if "adapter" in change.__name__:
            torch.set_default_dtype(dtype)
        try:
            change(wanted)
        finally:
            torch.set_default_dtype(torch.float32)
        with refused(layer):
            run(layer.block, tokens(24)[0].to(dtype))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_later_change_that_shows_is_found_at_once(folder: str, change: Change) -> None:
    layer = Single(folder)
    with apply_densemixer(layer.model):
        for seed in range(3):
            layer.train(*tokens(24, seed))
        change(layer.block.experts)
        with refused(layer):
            run(layer.block, tokens(24, 4)[0])


def test_a_later_change_that_does_not_show_is_found_soon() -> None:
    layer = Single("qwen3_moe")
    factor = 1.0
    forward = layer.block.experts.forward
    layer.block.experts.forward = lambda *args: factor * forward(*args)
    x, g = tokens(24)
    with apply_densemixer(layer.model):
        for _ in range(3):
            assert_close(layer.train(x, g), layer.truth(x, g, "densemixer"))
        factor = 0.5
        with refused(layer):
            for _ in range(OFTEN):
                run(layer.block, x)


def test_a_kernel_that_computes_another_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a quantised or fused one might that isn't what its name says; here with the weights to the power of two."""

    def other(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = batched_mm_experts_forward(self, x, index, weights.square())
        return output

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "other", other)
    layer = Single("qwen3_moe", "other")
    x, g = tokens(24)
    with apply_densemixer(layer.model), refused(layer):
        run(layer.block, x)
    layer = Single("qwen3_moe", "eager")
    with apply_densemixer(layer.model):
        layer.train(x, g)
        layer.block.experts.config._experts_implementation = "other"
        with refused(layer):
            for _ in range(OFTEN):
                run(layer.block, x)


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_left_behind(change: Change) -> None:
    """What refused a forward is taken away again, and training goes on."""
    layer = Single("qwen3_moe")
    x, g = tokens(24)
    with apply_densemixer(layer.model, DenseMixerConfig("centered")):
        before = dict(layer.block.experts._forward_hooks)
        change(layer.block.experts)
        with refused(layer):
            run(layer.block, x)
        vars(layer.block.experts).pop("forward", None)
        for key in [*layer.block.experts._forward_hooks]:
            if key not in before:
                del layer.block.experts._forward_hooks[key]
        assert_close(layer.train(x, g), layer.truth(x, g, "centered"))


@pytest.mark.parametrize("change", CHANGES)
def test_conventional_training_is_never_refused(change: Change) -> None:
    layer = Single("qwen3_moe")
    change(layer.block.experts)
    x, g = tokens(24)
    expected = layer.train(x, g)
    with apply_densemixer(layer.model, DenseMixerConfig("conventional")):
        ours = layer.train(x, g)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("when", ["before attaching", "after attaching", "after the first step"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_scaling_hook_after_all_others_is_right_or_refused(folder: str, estimator: str, when: str) -> None:
    """The gradient that reaches the sum is scaled as well, so both would do."""
    layer = Single(folder)
    x, g = tokens(24)

    def scale(experts: nn.Module) -> None:
        experts.register_forward_hook(lambda module, args, output: 0.5 * output)

    if when == "before attaching":
        scale(layer.block.experts)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        if when == "after the first step":
            layer.train(x, g)
        if when != "before attaching":
            scale(layer.block.experts)
        try:
            ours = layer.train(x, g)
        except mismatch():
            return
    assert_close(ours, layer.truth(x, g, estimator, dataclasses.replace(FORMULAS[folder], scaling=0.5)))


# From here on: it must not fire.


@pytest.mark.parametrize("folder", [folder for folder in architectures.found() if folder in FORMULAS])
def test_no_architecture_is_refused(folder: str) -> None:
    for cls in architectures.model_classes(folder):
        model = architectures.build(folder, cls)
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and folder in FLOAT32_ONLY:
                continue
            model.to(dtype)
            try:
                with apply_densemixer(model):
                    step(model)
            except UnsupportedModelError:
                pytest.skip("refused as a whole in this version")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_inputs_of_every_size(folder: str, implementation: str, dtype: torch.dtype) -> None:
    layer = Single(folder, implementation)
    layer.model.to(dtype)
    x, _ = tokens(24)
    for size in (0.0, 1e-6, 1e-2, 1.0, 30.0, 1e3):
        with apply_densemixer(layer.model):
            run(layer.block, (x * size).to(dtype))
    x[0, 5], x[0, 6, 3], x[0, 7] = torch.nan, torch.inf, 0.0
    with apply_densemixer(layer.model):
        run(layer.block, x.to(dtype))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_autocast(folder: str, implementation: str, dtype: torch.dtype, weights: str) -> None:
    layer = Single(folder, implementation)
    if weights == "bfloat16":
        layer.block.experts.to(torch.bfloat16)
    x, _ = tokens(24)
    for size in (1.0, 10.0):
        with apply_densemixer(layer.model), torch.autocast("cpu", dtype):
            run(layer.block, x * size)


@pytest.mark.parametrize("when", ["before attaching", "after attaching"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("folder", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_dropout_inside_the_experts(folder: str, implementation: str, when: str) -> None:
    """The same token gives other numbers at each call then."""
    layer = Single(folder, implementation)
    x, g = tokens(24)

    def add(experts: Any) -> None:
        experts.act_fn = nn.Sequential(experts.act_fn, nn.Dropout(0.5))

    if when == "before attaching":
        add(layer.block.experts)
    with apply_densemixer(layer.model):
        if when == "after attaching":
            layer.train(x, g)
            add(layer.block.experts)
        for seed in range(3):
            layer.train(*tokens(24, seed))


def test_dropout_inside_the_experts_of_a_model_that_evaluates() -> None:
    """It does nothing then, so there is something to compare."""
    layer = Single("qwen3_moe")
    layer.block.experts.act_fn = nn.Sequential(layer.block.experts.act_fn, nn.Dropout(0.5))
    layer.model.eval()
    x, g = tokens(24)
    with apply_densemixer(layer.model):
        layer.train(x, g)
        wrapped_forward(layer.block.experts)
        with refused(layer):
            run(layer.block, x)


@pytest.mark.parametrize("where", ["the block", "the router's input"])
def test_jitter(where: str) -> None:
    layer = Single("mixtral", **(dict(router_jitter_noise=0.2) if where == "the block" else {}))
    if where == "the router's input":
        layer.router.register_forward_pre_hook(lambda module, args: (args[0] * (1 + 0.2 * torch.rand_like(args[0])),))
    with apply_densemixer(layer.model):
        for seed in range(5):
            x, g = tokens(24, seed)
            run(layer.block, x.clone()).backward(g)  # the host multiplies it in place


@pytest.mark.parametrize("when", ["before attaching", "after attaching", "after the first step"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_router_replay(folder: str, estimator: str, when: str) -> None:
    """Indices that are recorded elsewhere take the place of the router's; their weights are its scores."""
    layer = Single(folder)
    x, g = tokens(24)
    recorded = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(t))[:3] for t in range(24)])
    renormalised = getattr(layer.router, "norm_topk_prob", True)

    def replay(router: Any, args: Any, output: Any) -> Any:
        probabilities = output[0] if torch.allclose(output[0].sum(-1), torch.ones(())) else output[0].softmax(-1)
        weights = probabilities.gather(-1, recorded)
        if renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return output[0], weights, recorded

    if when == "before attaching":
        layer.router.register_forward_hook(replay)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        if when == "after the first step":
            layer.train(x, g)
        if when != "before attaching":
            layer.router.register_forward_hook(replay)
        ours = layer.train(x, g)
    assert torch.equal(layer.indices[-1], recorded)
    formula = dataclasses.replace(FORMULAS[folder], renormalised=renormalised)
    assert_close(ours, layer.truth(x, g, estimator, formula, index=recorded))


@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss"])
def test_a_long_training(folder: str) -> None:
    """Whenever it looks again, with weights that change in place between forwards and backwards."""
    layer = Single(folder, "grouped_mm")
    optimizer = torch.optim.SGD(layer.block.parameters(), lr=1e-3)
    with apply_densemixer(layer.model):
        for seed in range(2 * OFTEN + 5):
            x, g = tokens(8, seed)
            run(layer.block, x).backward(g)
            optimizer.step()
            optimizer.zero_grad()
