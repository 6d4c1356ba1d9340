"""A layer of a real model of transformers against the reference: each implementation of its experts, dtype, budget."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from densemixer_adapters.selftest.outcome import Outcome, compared, unbiased
from densemixer_adapters.selftest.reference import relative_error, router_gradient
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

HIDDEN, TOKENS = 64, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = ("densemixer", "centered")
FLOOR = 1e-5
"""An error that is none: sums in another order, in float32."""
ALL_DRAWN, FLOOR_DRAWN = 0.999999, 1e-4
"""A budget that draws every pair, where the layer doesn't know it, and what the drawing itself may be off then."""
DRAWS = 32


def tiny_model(dtype: torch.dtype, device: str, **options: Any) -> Any:
    """A Qwen3-MoE model of one layer, with weights that are random and the same on each machine."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "moe_intermediate_size": 32, "num_experts": 16}
    sizes |= {"num_experts_per_tok": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(**sizes | {"head_dim": 32, "vocab_size": 64, "norm_topk_prob": True} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.to(device, dtype).train()


def tokens(dtype: torch.dtype, device: str, count: int = TOKENS, hidden: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """x and g, [1, count, hidden]."""
    x, g = torch.randn(2, 1, count, hidden, generator=torch.Generator().manual_seed(0))
    return x.to(device, dtype), g.to(device, dtype)


def implementations() -> list[str]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    local = {"batched_mm", "grouped_mm"}  # the others fetch a kernel from a hub, or want a group of ranks
    return ["eager", *sorted(local & set(ALL_EXPERTS_FUNCTIONS.valid_keys()))]


def check_gradients(device: str) -> Iterator[Outcome]:
    for implementation in implementations():
        for dtype in DTYPES:
            yield from _one(implementation, dtype, device)


def _one(implementation: str, dtype: torch.dtype, device: str) -> Iterator[Outcome]:
    model = tiny_model(dtype, device)
    model.set_experts_implementation(implementation)
    case = f"{implementation}, {str(dtype).removeprefix('torch.')}"
    try:
        step(copy.deepcopy(model).model.layers[0].mlp, *tokens(dtype, device))
    except (RuntimeError, NotImplementedError) as error:
        yield Outcome("gradients", case, "skipped", f"without DenseMixer: {str(error).splitlines()[0]}")
        return
    for estimator in ESTIMATORS:
        # They differ by a number for each token, which a dtype does nothing else to but where pairs are drawn.
        for budget in (1.0, ALL_DRAWN) if dtype == torch.float32 or estimator == ESTIMATORS[0] else (ALL_DRAWN,):
            yield _compare("gradients", case, model, device, DenseMixerConfig(estimator, budget=budget))
    if (implementation, dtype) == ("eager", torch.float32):  # the others' is no other
        yield _mean(case, model, device)


def check_compile(device: str) -> Iterator[Outcome]:
    model = tiny_model(torch.float32, device)
    model.set_experts_implementation("grouped_mm")
    plain = copy.deepcopy(model).model.layers[0].mlp
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(torch.compile(plain), *tokens(torch.float32, device))
    except Exception as error:  # no compiler for C++, an unknown GPU: there are many kinds
        yield Outcome("compile", "float32", "skipped", f"without DenseMixer: {str(error).splitlines()[0]}")
        return
    finally:
        torch.compiler.reset()
    # A budget is traced, but no code is generated of it: that alone takes a CPU a minute.
    for budget, backend in ((1.0, "inductor"), (ALL_DRAWN, "aot_eager")):
        yield _compare("compile", f"float32, {backend}", model, device, DenseMixerConfig(budget=budget), backend)
        torch.compiler.reset()


def _compare(
    check: str, case: str, model: Any, device: str, config: DenseMixerConfig, backend: str | None = None
) -> Outcome:
    """Not further from the truth than twice as far as training through all experts is in that dtype, or a floor."""
    block = _block(model, config)
    dtype = block.gate.weight.dtype
    x, g = tokens(dtype, device)
    if backend:
        step(block, x, g)  # the first forward also looks at the routing, which takes long to compile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = step(torch.compile(block, backend=backend) if backend else block, x, g)
    truth, usual = (_reference(model, x, g, config.estimator, precision) for precision in (torch.float64, dtype))
    drawn = config.budget < 1
    allowed = max(FLOOR_DRAWN if drawn else FLOOR, 2 * relative_error(usual, truth))
    case = f"{case}, {config.estimator}{', all pairs drawn' if drawn else ''}"
    return compared(check, case, relative_error(ours, truth), allowed)


def _mean(case: str, model: Any, device: str) -> Outcome:
    """Of the gradient over draws."""
    x, g = tokens(torch.float32, device)
    configs = [DenseMixerConfig("centered", budget=1 / 8, seed=seed) for seed in range(DRAWS)]
    draws = [step(_block(model, config), x, g) for config in configs]
    truth = _reference(model, x, g, "centered", torch.float64)
    return unbiased("gradients", f"{case}, centered, budget 1/8, mean of {DRAWS} draws", torch.stack(draws), truth)


def _block(model: Any, config: DenseMixerConfig) -> Any:
    """The layer of a copy of the model, with DenseMixer; in a workspace that the pairs of a budget don't fit into."""
    model = copy.deepcopy(model)
    apply_densemixer(model, dataclasses.replace(config, workspace_mb=1))
    return model.model.layers[0].mlp


def _reference(model: Any, x: Tensor, g: Tensor, estimator: str, dtype: torch.dtype) -> Tensor:
    """The gradient of the router by the formula, with the experts that the layer itself selects."""
    block = model.model.layers[0].mlp
    selected: list[Tensor] = []
    hook = block.experts.register_forward_pre_hook(lambda module, args: selected.append(args[1].detach()))
    with torch.no_grad():
        block(x)
    hook.remove()
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    return router_gradient(x[0], g[0], *weights, selected[0], estimator, dtype)


def step(block: Any, x: Tensor, g: Tensor) -> Tensor:
    """Forward and backward; returns the gradient of the router's weight."""
    block.zero_grad()
    output = block(x)
    (output[0] if isinstance(output, tuple) else output).backward(g)
    gradient: Tensor = block.gate.weight.grad
    return gradient
