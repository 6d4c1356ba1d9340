"""A router of a user's own: declared by a line, checked like those of transformers, and shown whole on its page."""

from __future__ import annotations

import types
from typing import Any

import oracle
import pytest
import torch
from pages import REPOSITORY, blocks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from densemixer_adapters.transformers import Router, UnsupportedModelError, apply_densemixer, register_router, routers
from densemixer_adapters.transformers.checks import OutputMismatchError
from densemixer_core import RoutingMismatchError

PAGE = REPOSITORY / "docs" / "own-router.md"
MODEL, DECLARATION, TRAINING = (block.text for block in blocks(PAGE) if block.language == "python")


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "_REGISTERED", {})


@pytest.fixture
def page() -> types.SimpleNamespace:
    """What the first block of the page defines. Its classes need a module, as those of a file would have."""
    names: dict[str, Any] = {"__name__": "own"}
    exec(compile(MODEL, "own-router.md", "exec"), names)
    return types.SimpleNamespace(**names)


def build(page: Any) -> Any:
    torch.manual_seed(0)
    model = page.MyModel(page.MyConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double()


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def dense(page: Any, model: Any, index: Tensor) -> Any:
    """The model with a layer that is the oracle's."""
    truth = build(page)
    block = truth.block

    def forward(block: Any, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        experts = block.experts
        functions = [
            oracle.gated_expert(*experts.gate_up_proj[j].chunk(2), experts.down_proj[j], F.silu) for j in range(8)
        ]
        formula = oracle.Formula(functions, torch.sigmoid, True, 2.5)
        y = oracle.densemixer(x, F.linear(x, block.router.weight), index, formula, "densemixer")
        return y.reshape(hidden_states.shape)

    block.forward = types.MethodType(forward, block)
    return truth


def test_the_model_of_the_page_trains_as_the_oracle_says(page: Any) -> None:
    model, ids, seen = build(page), torch.arange(24).reshape(2, 12), []
    exec(DECLARATION, {})
    model.block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    conventional = gradients(model, ids)
    before = model(ids)
    apply_densemixer(model)
    assert torch.equal(model(ids), before)
    ours = gradients(model, ids)
    with oracle.Float64():
        truth = gradients(dense(page, model, seen[0]), ids)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        assert oracle.worst_error(ours[name], expected) <= 1e-10, name
    name = "block.router.weight"
    assert oracle.relative_error(conventional[name], truth[name]) > 0.1


def test_the_page_trains(page: Any) -> None:
    exec(DECLARATION, {})
    names = dict(vars(page))
    exec(TRAINING, names)
    assert names["loss"].isfinite()


def test_the_line_of_the_message_is_what_is_to_be_written(page: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"block .*MyTopKRouter is unknown.*own-router\.md") as caught:
        apply_densemixer(build(page))
    line = str(caught.value).split("own-router.md): `")[1].split("`")[0]
    assert line == 'register_router("MyTopKRouter", Router("softmax", renormalised=True))'
    exec(line, {"register_router": register_router, "Router": Router})
    apply_densemixer(build(page))


def test_a_wrong_declaration_stops_the_first_step_and_can_be_put_right(page: Any) -> None:
    model, ids = build(page), torch.arange(24).reshape(2, 12)
    register_router("MyTopKRouter", Router("softmax", renormalised=True))
    message = r"block\.router \(MyTopKRouter\): .*softmax of its logits, .*from what register_router says"
    with apply_densemixer(model), pytest.raises(RoutingMismatchError, match=message):
        gradients(model, ids)
    register_router("MyTopKRouter", Router("sigmoid", renormalised=True))
    with apply_densemixer(model):
        gradients(model, ids)


def no_line(page: Any, model: Any) -> None:
    routers._REGISTERED.clear()


def a_wrong_line(page: Any, model: Any) -> None:
    register_router("MyTopKRouter", Router("softmax", renormalised=True))


def weights_first(page: Any, model: Any) -> None:
    forward = page.MyTopKRouter.forward
    page.MyTopKRouter.forward = lambda *args: forward(*args)[1::-1] + forward(*args)[2:]


def a_factor_in_the_experts(page: Any, model: Any) -> None:
    forward = page.MyExperts.forward
    page.MyExperts.forward = lambda *args: 2.5 * forward(*args)


ATTACHING, TRAINING_FORWARD = "`apply_densemixer`", "first training forward"


@pytest.mark.parametrize(
    ("wrong", "when", "error", "message"),
    [
        (no_line, ATTACHING, UnsupportedModelError, r"^block \(MyBlock\): .*MyTopKRouter is unknown"),
        (weights_first, TRAINING_FORWARD, UnsupportedModelError, r"^block.*must return its logits first"),
        (a_wrong_line, TRAINING_FORWARD, RoutingMismatchError, r"^block\.router \(MyTopKRouter\): "),
        (a_factor_in_the_experts, TRAINING_FORWARD, OutputMismatchError, r"^block \(MyExperts\): .*is 2.5 times"),
    ],
)
def test_the_errors_of_the_page(page: Any, wrong: Any, when: str, error: type[Exception], message: str) -> None:
    exec(DECLARATION, {})
    model, ids = build(page), torch.arange(24).reshape(2, 12)
    wrong(page, model)
    if when == TRAINING_FORWARD:
        apply_densemixer(model)
    with pytest.raises(error, match=message):
        apply_densemixer(model) if when == ATTACHING else gradients(model, ids)
    assert f"| `{error.__name__}` | {when}" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "declared",
    [
        Router("sigmoid", renormalised="norm_topk"),
        Router("sigmoid", True, epsilon="norm_topk"),
        Router("sigmoid", True, expert_scale="norm_topk"),
        Router("sigmoid", True, further="zero", scored="norm_topk"),
    ],
    ids=["renormalised", "epsilon", "expert_scale", "scored"],
)
def test_an_attribute_that_is_not_there(page: Any, declared: Router) -> None:
    register_router("MyTopKRouter", declared)
    with pytest.raises(UnsupportedModelError, match=r"^block \(MyBlock\): .*MyTopKRouter names 'norm_topk'"):
        apply_densemixer(build(page))


def test_experts_without_the_decorator(page: Any) -> None:
    exec(DECLARATION, {})
    model = build(page)
    plain = type("MyExperts", (nn.Module,), {})()
    plain.gate_up_proj, plain.down_proj = model.block.experts.gate_up_proj, model.block.experts.down_proj
    model.block.experts = plain
    with pytest.raises(UnsupportedModelError, match=r"decorate experts of your own.*own-router\.md"):
        apply_densemixer(model)


def test_logits_without_a_gradient_are_told(page: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As one returns them for the log alone. Nothing is trained then, so the user must know."""
    forward = page.MyTopKRouter.forward

    def detached(self: Any, x: Tensor) -> Any:
        logits, *others = forward(self, x)
        return logits.detach(), *others

    page.MyTopKRouter.forward = detached
    register_router("MyTopKRouter", Router("sigmoid", renormalised=True))
    model, ids = build(page), torch.arange(24).reshape(2, 12)
    conventional = gradients(model, ids)
    apply_densemixer(model)
    for _ in range(2):
        found = gradients(model, ids)
        assert all(found[name].equal(conventional[name]) for name in conventional)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "block.router" in warning
    assert "must not detach its logits" in warning


def test_a_router_that_returns_a_list(page: Any) -> None:
    exec(DECLARATION, {})
    model, ids = build(page), torch.arange(24).reshape(2, 12)
    apply_densemixer(model)
    expected = gradients(model, ids)
    forward = type(model.block.router).forward
    model.block.router.forward = lambda x: [*forward(model.block.router, x)]
    found = gradients(model, ids)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_router_that_returns_its_weights_first(page: Any) -> None:
    exec(DECLARATION, {})
    model, ids = build(page), torch.arange(24).reshape(2, 12)
    router, forward = model.block.router, type(model.block.router).forward
    router.forward = lambda x: forward(router, x)[1::-1] + forward(router, x)[2:]
    with apply_densemixer(model), pytest.raises(UnsupportedModelError, match="must return its logits first"):
        gradients(model, ids)


def test_a_plain_linear_router_goes_by_its_block(page: Any) -> None:
    """Its class says nothing."""

    class MyBlock(page.MyBlock):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)

        def forward(self, hidden_states: Tensor) -> Tensor:
            x = hidden_states.flatten(0, 1)
            weights, index = self.router(x).softmax(-1).topk(2, dim=-1)
            return self.experts(x, index, weights).reshape(hidden_states.shape)

    block, x = MyBlock(page.MyConfig()), torch.randn(2, 4, page.MyConfig().hidden_size)
    plain = type(block.router)
    for kind in (plain, type("Linear4bit", (plain,), {}), type("FSDPLinear", (FSDPModule, plain), {})):
        block.router.__class__ = kind
        with pytest.raises(UnsupportedModelError, match=r'register_router\("MyBlock", Router'):
            apply_densemixer(block)
    block.router.__class__ = plain
    register_router("MyBlock", Router("softmax", renormalised=False))
    with apply_densemixer(block):
        block(x).sum().backward()


def test_the_line_names_the_class_that_was_sharded(page: Any) -> None:
    model = build(page)
    router = model.block.router
    router.__class__ = type(f"FSDP{type(router).__name__}", (FSDPModule, type(router)), {})
    with pytest.raises(UnsupportedModelError, match=r'register_router\("MyTopKRouter", Router'):
        apply_densemixer(model)


def test_a_subclass_may_differ_from_what_it_is_of() -> None:
    """The nearest class says what it is, be it of transformers or not."""
    kind = type("MyRouter", (type("Qwen3MoeTopKRouter", (nn.Module,), {}),), {})
    assert routers.router_of(kind(), nn.Module()) == routers.ROUTERS["Qwen3MoeTopKRouter"]
    declared = Router("sigmoid", renormalised=False)
    register_router("MyRouter", declared)
    assert routers.router_of(kind(), nn.Module()) == declared


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (nn.Linear, Router("softmax", True)),
            TypeError,
            "takes the name of the router's class, and a Router; got <class",
        ),
        (("MyRouter", "softmax"), TypeError, "got 'MyRouter' and 'softmax'"),
        (("MyRouter", Router("gelu", True)), ValueError, "'gelu' is none of the scores softmax, sigmoid, sqrtsoftplus"),
        (("MyRouter", Router("softmax", True, further="identiy")), ValueError, "further must be .*got 'identiy'"),
        (("MyRouter", Router("softmax", 1)), TypeError, "renormalised must be bool or str; got 1"),
        (
            ("MyRouter", Router("softmax", True, epsilon=None)),
            TypeError,
            "epsilon must be float or int or str; got None",
        ),
        (
            ("MyRouter", Router("softmax", True, expert_scale=2.0)),
            TypeError,
            "expert_scale must be str or None; got 2.0",
        ),
        (("Qwen3MoeTopKRouter", Router("sigmoid", True)), ValueError, "declared already"),
        (("DeepseekV4HashRouter", Router("sigmoid", True)), ValueError, "declared already"),
    ],
)
def test_what_is_no_declaration(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register_router(*arguments)
