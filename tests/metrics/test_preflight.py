"""A look before training: against the dense oracle, against swaps that are forced, and against real trainings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from families import FAMILIES, Family, tokens
from peft import LoraConfig, get_peft_model
from runs import loss_of, selections
from torch import Tensor, nn
from torch.nn import functional as F

from densemixer_adapters.metrics.gradients import Measured
from densemixer_adapters.metrics.lost_updates import LostUpdates
from densemixer_adapters.preflight import Estimated, Preflight, preflight
from densemixer_adapters.preflight.agreement import cosine_of_halves
from densemixer_adapters.preflight.verdict import judge
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

QWEN = FAMILIES["qwen3_moe"]


def batches(count: int = 4, sequences: int = 4, length: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(sequences, length, seed)} for seed in range(count)]


def routers(family: Family, model: nn.Module) -> list[Any]:
    return [getattr(block, family.router) for block in family.blocks(model)]


# The gradients, and how far they agree.


def router_gradient(family: Family, model: nn.Module, ids: Tensor, estimator: str) -> list[Tensor]:
    """The oracle's, by layer, of all that a router has."""
    with selections(family, model) as indices, torch.no_grad():
        loss_of(model, ids)
    truth = family.oracle(model, indices, estimator)
    loss_of(truth, ids).backward()
    return [torch.cat([p.grad.flatten() for p in router.parameters()]) for router in routers(family, truth)]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe-not-renormalised"])
def test_halves_agree_as_the_gradients_of_the_oracle(name: str) -> None:
    family = FAMILIES[name]
    with oracle.Float64():
        model = family.build("eager").double()
        data = batches(4, 2, 8)
        found = preflight(model, data, steps=1)
        assert (len(found.estimators) == 3) == family.renormalised
        for estimator, result in found.estimators.items():
            by_batch = [router_gradient(family, model, batch["input_ids"], estimator) for batch in data]
            rows = [torch.stack(layer) for layer in zip(*by_batch, strict=True)]
            rows.append(torch.cat(rows, 1))
            cosines = [
                sum(F.cosine_similarity(row[list(a)].sum(0), row[list({*range(4)} - {*a})].sum(0), 0) for a in ways) / 6
                for row in rows
                for ways in [list(itertools.combinations(range(4), 2))]
            ]
            expected = pytest.approx([float(cosine) for cosine in cosines], rel=1e-8)
            assert [*result.agreement.layers, result.agreement.whole] == expected, estimator
            square = sum(gradient.square().sum() for gradient in rows[-1]) / 4
            signal = sum(a @ b for a, b in itertools.combinations(rows[-1], 2)) / 6
            noise = float(14 * (square - signal) / signal) if signal > 0 else math.inf
            assert result.noise_tokens == pytest.approx(noise, rel=1e-6)


def test_the_same_data_agrees_with_itself() -> None:
    (batch,) = batches(1)
    for result in preflight(QWEN.build(), [batch, batch]).estimators.values():
        assert result.agreement.layers == pytest.approx([1, 1])
        assert result.noise_tokens < 1e-3


# What swaps gain.


def routed(model: nn.Module, block: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """What the experts of a block are called with."""
    inputs: list[tuple[Tensor, ...]] = []
    hook = block.experts.register_forward_pre_hook(lambda module, args: inputs.append(args))
    model(input_ids=ids)
    hook.remove()
    return inputs[0]


def losses_of_swaps(
    family: Family, model: nn.Module, block: Any, ids: Tensor, pairs: list[tuple[int, int]], share: float
) -> Tensor:
    """The loss of a sequence for each pair of a token and an expert that gets that share of the weakest's place."""
    _, index, _ = routed(model, block, ids[None])
    p = scores_of(family, model, block, ids)
    forced = []
    for token, j in pairs:
        chosen = index[token]
        mass = p[token, chosen]
        mass = torch.where(mass == mass.min(), (1 - share) * mass, mass)
        mass = torch.cat([mass, share * p[token, [j]]])
        forced.append(family.scaling * mass / (mass.sum() if family.renormalised else 1))

    def force(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, index, given = args
        index, given = torch.cat([index, index[:, :1]], 1), torch.cat([given, 0 * given[:, :1]], 1)
        for row, ((token, j), weights) in enumerate(zip(pairs, forced, strict=True)):
            index[row * len(ids) + token, -1], given[row * len(ids) + token] = j, weights
        return x, index, given

    hook = block.experts.register_forward_pre_hook(force)
    logits = model(input_ids=ids.expand(len(pairs), -1)).logits
    hook.remove()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[1:].repeat(len(pairs)), reduction="none")
    return losses.view(len(pairs), -1).mean(1)


def scores_of(family: Family, model: nn.Module, block: Any, ids: Tensor) -> Tensor:
    x = routed(model, block, ids[None])[0]
    return family.score(family.logits(block, x.reshape(-1, x.shape[-1])))


@torch.no_grad()
def forced_gains(family: Family, model: nn.Module, ids: Tensor, layer: int) -> tuple[float, float]:
    """Nats for each token of one sequence: of the best swaps, and of those with the strongest unselected expert."""
    block: Any = family.blocks(model)[layer]
    _, index, _ = routed(model, block, ids[None])
    p = scores_of(family, model, block, ids)
    pairs = [(t, j) for t in range(len(ids)) for j in range(p.shape[-1]) if j not in index[t]]
    share = 1e-4
    up, down = (losses_of_swaps(family, model, block, ids, pairs, s) for s in (share, -share))
    falls = (-(up - down) / (2 * share)).view(len(ids), -1)
    others = torch.tensor([j for _, j in pairs]).view(len(ids), -1)
    following = p.gather(-1, others).argmax(-1, keepdim=True)
    return float(falls.amax(-1).clamp(min=0).sum()), float(falls.gather(-1, following).clamp(min=0).sum())


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe-not-renormalised", "deepseek_v3"])
def test_swaps_gain_what_they_do_when_they_are_forced_by_degrees(name: str) -> None:
    family, two = FAMILIES[name], batches(2, 1, 6)
    with oracle.Float64():
        model = family.build("eager").double().eval()
        found = preflight(model, two)
        gains = [[forced_gains(family, model, one["input_ids"][0], layer) for one in two] for layer in range(2)]
    for layer, of_layer in enumerate(gains):
        best, following = (sum(gain) / 2 for gain in zip(*of_layer, strict=True))  # loss_of is a mean over tokens
        assert found.best_swap.layers[layer] == pytest.approx(best, rel=1e-5)
        assert found.next_swap.layers[layer] == pytest.approx(following, rel=1e-5)
        assert best > following
    assert found.best_swap.whole == pytest.approx(sum(found.best_swap.layers))


# How far the steps move the routing.


def choices(family: Family, model: nn.Module, data: Sequence[dict[str, Tensor]]) -> list[list[set[int]]]:
    """By layer, the experts of each token."""
    with selections(family, model) as indices, torch.no_grad():
        for batch in data:
            model(**batch)
    count = len(family.blocks(model))
    return [[set(row) for index in indices[layer::count] for row in index.tolist()] for layer in range(count)]


def changed(before: list[list[set[int]]], after: list[list[set[int]]]) -> list[float]:
    """The share of the choices that are gone, by layer."""
    return [
        sum(len(a - b) for a, b in zip(one, other, strict=True)) / sum(map(len, one))
        for one, other in zip(before, after, strict=True)
    ]


def train(model: nn.Module, data: list[dict[str, Tensor]], steps: int, rate: float, estimator: str) -> None:
    """Of the routers alone."""
    weights = [router.weight for router in routers(QWEN, model)]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    with apply_densemixer(model, DenseMixerConfig(estimator)):
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, data[step % len(data)]["input_ids"]).backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("steps", "rate", "estimators"),
    [(12, 3e-3, ["conventional", "densemixer", "centered"]), (8, 1e-7, ["densemixer"])],
)
def test_a_training_changes_as_many_choices(steps: int, rate: float, estimators: list[str]) -> None:
    """On the same batches: half as many to one and a half times as many."""
    data = batches(2, 8)
    found = preflight(QWEN.build(), data, steps=steps, learning_rate=rate)
    before = choices(QWEN, QWEN.build(), data)
    for estimator in estimators:
        result, model = found.estimators[estimator], QWEN.build()
        train(model, data, steps, rate, estimator)
        truth = changed(before, choices(QWEN, model, data))
        for layer, share in enumerate(truth):
            assert result.change.layers[layer] == pytest.approx(share, rel=0.5)
        assert truth[0] <= found.at_most.layers[0]  # which knows nothing of what the layers below do
        assert (rate > 1e-6) == (sum(truth) > 0.02)
    assert (found.verdict.works is False) == (rate < 1e-6)
    if rate < 1e-6:
        assert found.at_most.whole < 0.01
        assert found.verdict.text.startswith("routers would leave the routing as it is: 8 steps at 1e-07 change ")


def test_a_training_that_sees_no_batch_twice_changes_as_many() -> None:
    """More steps than are taken one by one, on a text with a signal: half as many to one and a half times as many."""
    generator = torch.Generator().manual_seed(0)
    text = [{"input_ids": 3 + torch.randint(6, (8, 12), generator=generator)} for _ in range(84)]
    data, rest = text[:4], text[4:]
    found = preflight(QWEN.build(), data, steps=len(rest), learning_rate=3e-4)
    assert found.verdict.works is True
    model = QWEN.build()
    before = choices(QWEN, model, data)
    train(model, rest, len(rest), 3e-4, "centered")
    truth = changed(before, choices(QWEN, model, data))
    for layer, share in enumerate(truth):
        assert found.estimators["centered"].change.layers[layer] == pytest.approx(share, rel=0.5)
    assert min(truth) > 10 * found.by_noise.whole


def test_noise_changes_as_many_choices() -> None:
    """Of the first layer, whose router walks at random."""
    model, data, steps, rate = QWEN.build(), batches(2, 8), 25, 0.004
    found = preflight(model, data, steps=steps, learning_rate=rate)
    before, weight = choices(QWEN, model, data), routers(QWEN, model)[0].weight
    start, shares = weight.detach().clone(), []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight.copy_(start + rate * steps**0.5 * torch.randn(start.shape, generator=generator))
        shares.append(changed(before, choices(QWEN, model, data))[0])
    assert found.by_noise.layers[0] == pytest.approx(sum(shares) / len(shares), rel=0.25) != 0
    assert found.by_noise.layers[0] < found.at_most.layers[0]


@pytest.mark.parametrize("rate", [1e-5, 7e-4, 3e-3])
def test_rounding_swallows_what_it_swallows_in_a_step(rate: float) -> None:
    model, data = QWEN.build().bfloat16(), batches(2)
    found = preflight(model, data, steps=1, learning_rate=rate)
    assert found.dtype == "bfloat16"
    for estimator in ("conventional", "centered"):
        trained = QWEN.build().bfloat16()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=0.0)
        with apply_densemixer(trained, DenseMixerConfig(estimator)) as handle:
            lost = LostUpdates(handle.layers)
            loss_of(trained, data[0]["input_ids"]).backward()
            lost.before_step(optimizer)
            optimizer.step()
            lost.after_step()
            assert lost.measure()["updates_lost"] == found.estimators[estimator].lost
    assert (found.estimators["centered"].lost.whole > 0.9) == (rate < 1e-4)


def test_an_update_that_is_rounded_away_moves_nothing() -> None:
    wide, half = (
        preflight(QWEN.build().to(dtype), batches(2), steps=1000, learning_rate=2e-5)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.estimators["centered"].change.whole > 0.02
    assert wide.estimators["centered"].lost.whole < 0.01
    assert half.estimators["centered"].change.whole < 0.25 * wide.estimators["centered"].change.whole
    assert "% of their updates lost to rounding" in half.verdict.text


def test_where_a_bias_selects_there_is_no_bound() -> None:
    found = preflight(FAMILIES["deepseek_v3"].build(), batches(2), steps=10, learning_rate=1e-2)
    assert math.isnan(found.at_most.whole)
    assert math.isnan(found.margins[0][0])
    assert 0 < found.estimators["centered"].change.whole < 1


# What it leaves as it was, and what it looks at.


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Weights, their gradients, what trains, modes, hooks and random numbers."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None

    def state() -> list[Any]:
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [modules, [(id(p), p.requires_grad, id(p.grad)) for p in model.parameters()]]

    def numbers() -> list[Tensor]:
        values = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return [value.detach().clone() for value in values] + [torch.get_rng_state()]

    before, values = state(), numbers()
    yield
    assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(values, numbers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_changed(dtype: torch.dtype) -> None:
    model: Any = QWEN.build().to(dtype)
    model.model.layers[1].eval()
    model.lm_head.requires_grad_(False)
    with unchanged(model):
        found = preflight(model, batches(2), steps=4)
    assert found.best_swap.whole > 0
    assert all(math.isfinite(one.agreement.whole) for one in found.estimators.values())


def test_nothing_is_changed_by_a_failure() -> None:
    model, data = QWEN.build(), batches()
    data[3]["input_ids"] = data[3]["input_ids"] + 1000  # beyond the vocabulary
    with unchanged(model), pytest.raises(IndexError):
        preflight(model, data)


def look(model: nn.Module, data: list[dict[str, Tensor]]) -> Preflight:
    return preflight(model, data, steps=8, learning_rate=0.005)


def same(one: Preflight, other: Preflight) -> None:
    assert one.best_swap.layers == pytest.approx(other.best_swap.layers, rel=1e-4)
    assert one.margins[1] == pytest.approx(other.margins[1], rel=1e-4)
    assert one.at_most.layers == pytest.approx(other.at_most.layers)
    for name, result in one.estimators.items():
        assert result.agreement.layers == pytest.approx(other.estimators[name].agreement.layers, rel=1e-3)
        assert result.change.layers == pytest.approx(other.estimators[name].change.layers, abs=0.02)


def test_padding_does_not_count() -> None:
    padded = []
    for batch in batches(2):
        ids = F.pad(batch["input_ids"], (0, 5))
        padded.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    same(look(QWEN.build(), padded), look(QWEN.build(), batches(2)))


def test_labels_say_what_is_predicted() -> None:
    plain = look(QWEN.build(), batches(2))
    labelled = [{**batch, "labels": batch["input_ids"].clone()} for batch in batches(2)]
    same(look(QWEN.build(), labelled), plain)
    for batch in labelled:
        batch["labels"][:, :8] = -100
    found = look(QWEN.build(), labelled)
    assert found.tokens == 4 * 4
    assert found.estimators["centered"].agreement != plain.estimators["centered"].agreement


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "gpt_oss"])
def test_other_families(name: str) -> None:
    found = look(FAMILIES[name].build(), batches(2))
    assert all(0 < one.change.whole < 1 for one in found.estimators.values())
    assert found.verdict.text


# Routers that don't train, or in another way.


def test_lora_leaves_routers_frozen() -> None:
    model = get_peft_model(QWEN.build(), LoraConfig(r=4, target_modules=["o_proj"]))
    with unchanged(model):
        found = look(model, batches(2))
    assert found.frozen
    assert found.verdict.works is False
    assert found.verdict.text.startswith("all routers are frozen, so none of them would train")
    same(found, look(QWEN.build(), batches(2)))  # what would be


@pytest.mark.parametrize("router", ["modules_to_save", "target_parameters"])
def test_lora_that_trains_routers(router: str) -> None:
    options = {"modules_to_save": ["mlp.gate"], "target_parameters": ["mlp.gate.weight"]}
    config = LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False, **{router: options[router]})
    model = get_peft_model(QWEN.build(), config)
    with unchanged(model):
        found = look(model, batches(2))
    assert not found.frozen
    assert 0.01 < found.estimators["centered"].change.whole < 1
    # An adapter doesn't move as the weight does.
    assert math.isnan(found.at_most.whole) == (router == "target_parameters")


def test_one_frozen_router() -> None:
    model: Any = QWEN.build()
    model.model.layers[0].mlp.gate.requires_grad_(False)
    found = look(model, batches(2))
    assert found.trained == [False, True]
    assert [math.isnan(value) for value in found.at_most.layers] == [True, False]
    assert found.estimators["centered"].change.layers[0] == 0
    assert found.estimators["centered"].change.layers[1] > 0
    assert math.isnan(found.estimators["centered"].agreement.layers[0])
    assert found.verdict.works is not False


# Errors, and what the numbers say.


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (batches(3), {}, "an even number of them, not 3"),
        ([], {}, "an even number of them, not 0"),
        ([{"labels": tokens()}] * 2, {}, "`input_ids` of"),
        ([{"input_ids": tokens(), "labels": torch.full((2, 12), -100)}] * 2, {}, "no token to predict"),
        (batches(2), {"steps": 0}, "a step and a learning rate above 0"),
        (batches(2), {"learning_rate": 0.0}, "a step and a learning rate above 0"),
    ],
)
def test_what_cannot_be_looked_at(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preflight(QWEN.build(), data, **options)


def test_a_model_that_predicts_no_tokens() -> None:
    model: Any = QWEN.build()
    with pytest.raises(ValueError, match="Qwen3MoeModel returns no logits of the next token"):
        preflight(model.model, batches(2))


def test_densemixer_is_attached_already() -> None:
    model = QWEN.build()
    with apply_densemixer(model), pytest.raises(RuntimeError, match="attached already"):
        preflight(model, batches())


def said(change: float, agreement: float, gain: float, at_most: float = 0.5, lost: float = 0.0) -> tuple[Any, str]:
    one = Estimated(Measured([], agreement), 5e4, Measured([], change), Measured([], lost))
    found = judge(False, 1000, 1e-5, 2048, Measured([], at_most), Measured([], gain), {"densemixer": one})
    return found.works, found.text


def test_what_is_said() -> None:
    """Its thresholds, each from both sides."""
    assert said(0.05, 0.4, 0.2)[0] is True
    assert said(0.05, 0.4, 0.2)[1].endswith("; whether models become better, a control run must say")
    assert said(0.05, 0.4, 0.009) == (None, said(0.05, 0.4, 0.009)[1])
    assert "little to win" in said(0.05, 0.4, 0.009)[1]
    assert said(0.05, 0.09, 0.2)[0] is None
    assert (
        "signal and noise are equal at about 5e+04 tokens a step, of which a batch has 2048" in said(0.05, 0.09, 1)[1]
    )
    assert said(0.05, math.nan, 0.2)[0] is None
    assert said(0.009, 0.4, 0.2)[0] is None
    assert "hardly" in said(0.009, 0.4, 0.2)[1]
    assert said(0.0009, 0.4, 0.2)[0] is False
    assert said(0.05, 0.4, 0.2, at_most=0.009)[0] is False
    assert said(0.05, 0.4, 0.2, at_most=math.nan)[0] is True
    assert "with 99.9 % of their updates lost to rounding" in said(0.0, 0.4, 0.2, lost=0.999)[1]


def test_many_batches_are_halved_in_some_ways() -> None:
    random = torch.Generator().manual_seed(0)
    signal, noise = torch.randn(41, 50, generator=random, dtype=torch.float64).split([1, 40])
    rows = noise + signal
    expected = 20 / 21  # signal and noise of a batch are as large
    assert cosine_of_halves(rows @ rows.T) == pytest.approx(expected, abs=0.05)
