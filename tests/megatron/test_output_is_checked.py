"""What a layer's experts return is compared with what DenseMixer takes them for: their weights.

Hooks, patched forwards, subclasses, adapters and quantisation may change it. The router's gradient would be wrong.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import oracle
import torch
from cases import CASES
from changes import CHANGES, KINDS, SHOWN, Change, patched_forward, scale, scaling_hook
from checks import truth
from moe_layer import batch, build, run
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.megatron import apply_densemixer
from densemixer_adapters.transformers.checks import EVERY, OutputMismatchError
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]


def built(kind: str, **options: Any) -> Any:
    """A layer with experts of this class."""
    if not KINDS[kind].exists:
        pytest.skip("of another Megatron Core, whose session runs it")
    return build(KINDS[kind], **options)


def refused(kind: str) -> Any:
    return pytest.raises(OutputMismatchError, match=rf"(?s)^Mixture-of-Experts layer 1, experts \(\w*{kind}\): ")


def assert_right(layer: Any, kind: str, estimator: str) -> None:
    """The next step's gradient of the router is the oracle's."""
    layer.zero_grad()
    x, g = batch(KINDS[kind])
    ours, index = run(layer, x, g)
    exact = truth(layer, x, g, index, estimator, torch.float64)
    assert oracle.relative_error(ours.router, exact.router) < (1e-5 if x.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_in_the_first_forward(kind: str, change: Change, estimator: str) -> None:
    layer = built(kind)
    x, g = batch(KINDS[kind])
    with apply_densemixer(layer, DenseMixerConfig(estimator)):
        change(layer)
        with torch.no_grad():
            layer(x)  # not a training forward
        for _ in range(2):
            with refused(kind):
                layer(x)
    run(layer, x, g)


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_what_was_there_before_attaching(kind: str, change: Change) -> None:
    layer = built(kind)
    change(layer)
    with apply_densemixer(layer), refused(kind):
        layer(batch(KINDS[kind])[0])


@pytest.mark.parametrize("change", SHOWN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_change_that_shows_is_found_at_once(kind: str, change: Change) -> None:
    layer = built(kind, moe_densemixer=True)
    for _ in range(3):
        assert_right(layer, kind, "densemixer")
    change(layer)
    with refused(kind):
        layer(batch(KINDS[kind])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_change_that_does_not_show_is_found_soon(kind: str) -> None:
    """As an adapter that starts from zero. In between nothing is compared, and nothing costs anything."""
    layer = built(kind)
    factor = 1.0
    forward = layer.experts.forward
    layer.experts.forward = lambda *args: (factor * forward(*args)[0], None)
    x, _ = batch(KINDS[kind])
    with apply_densemixer(layer):
        assert_right(layer, kind, "densemixer")
        factor = 0.5
        for _ in range(EVERY - 1):
            layer(x)
        with refused(kind):
            layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_recomputation(kind: str) -> None:
    recompute: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    """What is trained is what is computed again."""
    layer = built(kind, moe_densemixer=True, **recompute)
    assert_right(layer, kind, "densemixer")
    scaling_hook(layer)
    with refused(kind):
        run(layer, *batch(KINDS[kind]))


@pytest.mark.parametrize("name", ["shared experts, overlapped", "latent", "uneven", "router in float64"])
def test_with_what_is_around_the_experts(name: str) -> None:
    case = CASES[name]
    if not case.exists:
        pytest.skip(f"Megatron Core has it since {case.since}")
    layer = build(case, moe_densemixer=True)
    run(layer, *batch(case))
    scaling_hook(layer)
    with refused("SequentialMLP"):
        layer(batch(case)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(kind: str) -> None:
    """What refused a forward is taken away again, and training goes on."""
    layer = built(kind)
    with apply_densemixer(layer, DenseMixerConfig("centered")):
        patched_forward(layer)
        with refused(kind):
            layer(batch(KINDS[kind])[0])
        del layer.experts.forward
        assert_right(layer, kind, "centered")
    assert not {"dispatch_postprocess", "combine_preprocess"} & vars(layer.token_dispatcher).keys()


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_conventional_training_is_never_refused(kind: str, change: Change) -> None:
    layers = [built(kind), built(kind, moe_densemixer={"estimator": "conventional"})]
    for layer in layers:
        change(layer)
    host, ours = (run(layer, *batch(KINDS[kind]))[0] for layer in layers)
    assert torch.equal(ours.router, host.router)


class Adapter(nn.Module):
    """Around a projection, as adapters are: what isn't its own is that of the projection."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.low_rank = nn.Linear(2, 2)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any) -> Any:
        return self.base(*args)


@pytest.mark.parametrize("when", ["before attaching", "after the first step"])
@pytest.mark.parametrize("kind", ["SequentialMLP", "TEGroupedMLP"])
def test_an_adapter_that_shows_the_weights_of_its_projection(kind: str, when: str) -> None:
    """It may start from zero: then its output says nothing yet."""
    layer = built(kind)
    owners = getattr(layer.experts, "local_experts", [layer.experts])

    def adapt() -> None:
        for owner in owners:
            owner.linear_fc2 = Adapter(owner.linear_fc2)

    def attach() -> None:
        if when == "before attaching":
            adapt()
        apply_densemixer(layer)
        assert_right(layer, kind, "densemixer")
        adapt()
        layer(batch(KINDS[kind])[0])

    with pytest.raises(UnsupportedModelError, match=r"Adapter has no parameter weight0? of its own.*without adapters"):
        attach()


# From here on: it must not fire.


def observer(layer: Any) -> None:
    layer.experts.register_forward_hook(lambda module, args, output: None)


def same_forward(layer: Any) -> None:
    forward = layer.experts.forward
    layer.experts.forward = lambda *args: forward(*args)


def same_class(layer: Any) -> None:
    layer.experts.__class__ = type("Mine", (type(layer.experts),), {})


def recomputed(layer: Any) -> None:
    layer.experts.forward = functools.partial(checkpoint, layer.experts.forward, use_reentrant=False)


def other_activation(layer: Any) -> None:
    """In the configuration, which the experts share, and which DenseMixer reads."""
    layer.config.activation_func = F.relu


HARMLESS = [observer, same_forward, same_class, recomputed, other_activation]


@pytest.mark.parametrize("when", ["before attaching", "after the first step"])
@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_nothing_that_matters(kind: str, change: Change, when: str) -> None:
    if kind == "GroupedMLP" and change is other_activation:
        pytest.skip("it has looked at the configuration when it was built")
    layer = built(kind)
    if when == "before attaching":
        change(layer)
    with apply_densemixer(layer):
        assert_right(layer, kind, "densemixer")
        if when == "after the first step":
            change(layer)
        assert_right(layer, kind, "densemixer")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_done_to_the_whole_layer_is_none_of_its_business(kind: str) -> None:
    layer, twin = built(kind, moe_densemixer=True), built(kind, moe_densemixer=True)
    layer.register_forward_hook(lambda module, args, output: scale(output))
    x, g = batch(KINDS[kind])
    ours, half = run(layer, x, g)[0], run(twin, x, 0.5 * g)[0]
    assert torch.equal(ours.router, half.router)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_size(kind: str, dtype: torch.dtype) -> None:
    layer = built(kind).to(KINDS[kind].dtype if kind == "GroupedMLP" else dtype)
    x, _ = batch(KINDS[kind])
    x = x.to(layer.router.weight.dtype)
    for size in (0.0, 1e-6, 1e-2, 1.0, 30.0, 1e3):
        with apply_densemixer(layer):
            layer(x * size)
    x[0, 0], x[1, 0, 3], x[2] = torch.nan, torch.inf, 0.0
    with apply_densemixer(layer):
        layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_inside_the_experts(kind: str) -> None:
    """The same token gives other numbers at each call then; but not while the model evaluates."""
    layer = built(kind)
    layer.experts.dropout = nn.Dropout(0.5)
    forward = layer.experts.forward
    layer.experts.forward = lambda *args: (layer.experts.dropout(forward(*args)[0]), None)
    x, g = batch(KINDS[kind])
    with apply_densemixer(layer):
        run(layer, x, g)
        layer.eval()
        assert_right(layer, kind, "densemixer")
        scaling_hook(layer)
        with refused(kind):
            layer(x)
