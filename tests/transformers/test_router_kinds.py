"""What is special about each kind of router, on top of the sweep's comparison with the oracle.

`Seen` holds what a layer did in one training step; ``extra`` is what DenseMixer added to the scores' gradient.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import architectures
import oracle
import pytest
import torch
import transformers
from formulas import expert
from sweep import step
from torch import Tensor, nn

from densemixer_adapters.observer import Forward
from densemixer_adapters.transformers import DenseMixerLayer, apply_densemixer, routers
from densemixer_core import DenseMixerConfig, RoutingMismatchError


@dataclasses.dataclass
class Seen:
    """One layer in one step; all but ``index`` in float64, [tokens, ...]."""

    layer: DenseMixerLayer
    model: nn.Module  # alive as long as its layer is looked at
    x: Tensor
    index: Tensor
    weights: Tensor
    scores: Tensor
    g: Tensor  # the gradient of the experts' output
    extra: Tensor  # the gradient that DenseMixer adds to the scores

    @property
    def c(self) -> Tensor:
        """The factor between weights and scores, [tokens, 1]."""
        return self.weights[:, :1] / self.scores.gather(1, self.index[:, :1])

    @property
    def unselected(self) -> Tensor:
        return torch.ones_like(self.scores, dtype=torch.bool).scatter(1, self.index, False)

    def dot(self, j: int) -> Tensor:
        """⟨g, E_j(x)⟩."""
        return (self.g * expert(self.layer.experts, j)(self.x)).sum(-1)


def train(model: nn.Module) -> tuple[list[Seen], dict[str, Tensor]]:
    """One training step with DenseMixer: what its layers did, and all gradients."""
    records: list[dict[str, Any]] = []

    def record(layer: DenseMixerLayer) -> dict[str, Any]:
        seen: dict[str, Any] = {"layer": layer, "model": model}

        def observe(forward: Forward, output: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
            assert scores is not None
            seen["scores"] = scores.detach()
            tap = scores.view_as(scores)
            tap.register_hook(lambda gradient: seen.update(extra=gradient))
            return output, tap

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, seen["index"], weights = args
            seen["x"], seen["weights"] = x.detach().reshape(-1, x.shape[-1]), weights.detach()
            output.register_hook(lambda gradient: seen.update(g=gradient.reshape(-1, gradient.shape[-1])))

        layer.observer = observe
        layer.experts.register_forward_hook(after)
        return seen

    with apply_densemixer(model) as handle:
        records = [record(layer) for layer in handle.layers]
        _, gradients = step(model)
    return [Seen(**seen) for seen in records], gradients


def tiny(folder: str, **options: Any) -> nn.Module:
    if folder not in architectures.found():
        pytest.skip(f"transformers {transformers.__version__} has no {folder}")
    return architectures.build(folder, **options).double()


def test_group_limited_routers_learn_from_the_groups_they_may_not_pick() -> None:
    with oracle.Float64():
        layers, _ = train(tiny("deepseek_v3", n_group=4, topk_group=1, num_experts_per_tok=2))
    for seen in layers:
        groups = seen.index // 2
        assert (groups[:, 0] == groups[:, 1]).all()  # both from the one group that may be picked
        assert not seen.index.sort()[0].equal(seen.scores.topk(2)[1].sort()[0])
        for j in range(8):
            rows = seen.unselected[:, j]
            torch.testing.assert_close(seen.extra[rows, j], (seen.c[:, 0] * seen.dot(j))[rows])
            assert seen.extra[rows, j].any()


def test_the_bias_of_a_router_acts_on_the_selection_alone() -> None:
    """Adding the same to all biases selects the same experts, and must not change a single gradient."""
    with oracle.Float64():
        model = tiny("deepseek_v3", n_group=1, topk_group=1)
        layers, gradients = train(model)
        for seen in layers:
            assert not seen.index.sort()[0].equal(seen.scores.topk(3)[1].sort()[0])  # it does act on the selection
            seen.layer.router.e_score_correction_bias += 3
        again, gradients_again = train(model)
    for seen, other in zip(layers, again, strict=True):
        assert torch.equal(seen.index, other.index)
        torch.testing.assert_close(seen.weights, other.weights)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, msg=name)


@pytest.mark.parametrize(("folder", "coupled"), [("minimax_m2", False), ("ernie4_5_moe", True)])
def test_a_sigmoid_router_moves_its_logits_one_by_one(folder: str, coupled: bool) -> None:
    """The logits' gradients of a softmax add up to zero, those of a sigmoid don't."""
    with oracle.Float64():
        model = tiny(folder)
        logits: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            output[0].retain_grad()
            logits.append(output[0])

        with apply_densemixer(model) as handle:
            for layer in handle.layers:
                layer.router.register_forward_hook(keep)
            step(model)
    assert logits
    for output in logits:
        total = output.grad.sum(-1).abs().max() / output.grad.abs().max()
        assert (total < 1e-12) == coupled


def test_a_hash_routed_layer_trains_conventionally_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Its experts are those of the token's id. It comes last here, so that no gradient of other layers reaches it."""
    with oracle.Float64():
        model = tiny("deepseek_v4", mlp_layer_types=["moe", "hash_moe"])
        _, conventional = step(model)
        layers, ours = train(model)
    assert [seen.layer.name for seen in layers] == ["model.layers.0.mlp"]
    assert torch.equal(ours["model.layers.1.mlp.gate.weight"], conventional["model.layers.1.mlp.gate.weight"])
    trained = "model.layers.0.mlp.gate.weight"
    assert oracle.relative_error(ours[trained], conventional[trained]) > 0.1
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "model.layers.1.mlp to conventional training: it picks experts by token id" in warning.getMessage()


def test_an_expert_that_skips_gets_no_gradient_and_the_others_do() -> None:
    """Its output is zero. Tokens that chose it still teach the scores of the others."""
    with oracle.Float64():
        layers, _ = train(tiny("zaya"))
    skipped = 0
    for seen in layers:
        assert seen.scores.shape[1] == 9
        assert not seen.extra[:, 8].any()
        tokens = (seen.weights == 0).squeeze(1)
        skipped += int(tokens.sum())
        for j in range(8):
            torch.testing.assert_close(seen.extra[tokens, j], seen.dot(j)[tokens])
    assert skipped > 0


def test_an_expert_that_returns_its_input_teaches_the_router_that() -> None:
    if transformers.__version__ == "5.5.4":
        pytest.skip("refused in this version")
    with oracle.Float64():
        layers, _ = train(tiny("longcat_flash"))
    for seen in layers:
        assert seen.scores.shape[1] == 10
        for j in (8, 9):
            rows = seen.unselected[:, j]
            assert rows.any()
            torch.testing.assert_close(seen.extra[rows, j], (seen.c[:, 0] * (seen.g * seen.x).sum(-1))[rows])


def test_a_budget_where_some_experts_have_no_weights() -> None:
    """As large a one as there is draws nearly all pairs: how many a token has differs from token to token."""
    if transformers.__version__ == "5.5.4":
        pytest.skip("refused in this version")
    with oracle.Float64():
        model = tiny("longcat_flash")
        gradients = []
        for config in (DenseMixerConfig("conventional"), DenseMixerConfig(), DenseMixerConfig(budget=1 - 1e-9)):
            with apply_densemixer(model, config) as handle:
                gradients.append(step(model)[1])
    for name in (f"{layer.router_name}.classifier.weight" for layer in handle.layers):
        conventional, exact, drawn = (found[name] for found in gradients)
        assert (drawn - exact).norm() < 0.3 * (conventional - exact).norm()


def test_a_scale_of_each_expert_is_part_of_the_expert() -> None:
    """The weights are scores over their sum, times the expert's scale: what it adds is scaled, the factor c isn't."""
    with oracle.Float64():
        layers, _ = train(tiny("gemma4"))
    for seen in layers:
        scale = seen.layer.router.per_expert_scale.detach()
        c = 1 / seen.scores.gather(1, seen.index).sum(1)
        torch.testing.assert_close(seen.weights, c[:, None] * (seen.scores * scale).gather(1, seen.index))
        for j in range(8):
            rows = seen.unselected[:, j]
            torch.testing.assert_close(seen.extra[rows, j], (c * scale[j] * seen.dot(j))[rows])


def test_renormalised_top_1_learns_from_unselected_experts_alone() -> None:
    """Its weight is always 1, so conventional training gives the router no gradient at all."""
    with oracle.Float64():
        model = tiny("mixtral", num_experts_per_tok=1)
        _, conventional = step(model)
        layers, ours = train(model)
    for seen in layers:
        name = f"{seen.layer.router_name}.weight"
        assert (seen.weights == 1).all()
        assert conventional[name].abs().max() < 1e-12 * ours[name].abs().max()


def test_a_wrong_score_of_top_1_is_seen_where_weights_are_not_renormalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's weight is proportional to any score; only other tokens tell."""
    monkeypatch.setitem(routers.ROUTERS, "Qwen3MoeTopKRouter", routers.Router("sigmoid", "norm_topk_prob"))
    model = tiny("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False)
    with apply_densemixer(model), pytest.raises(RoutingMismatchError, match=r"model\.layers\.0\.mlp\.gate .*sigmoid"):
        step(model)
