"""Router metrics in one process: their numbers against the oracle, and the HF Trainer's log."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import types
from typing import Any

import architectures
import oracle
import pytest
import torch
import transformers
from families import FAMILIES, Family, tokens
from runs import loss_of, selections
from sweep import step
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from densemixer_adapters.callback import DenseMixerCallback, patch_trainer
from densemixer_adapters.metrics.drift import RoutingDrift
from densemixer_adapters.metrics.gradients import RouterMeter, named
from densemixer_adapters.metrics.lost_updates import LostUpdates
from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer, attached_layers
from densemixer_core import DenseMixerConfig

PREFIX = "densemixer/"
GRADIENT = ("router_grad_norm", "router_grad_share_unselected", "router_grad_cosine_conventional")
NAMES = {*GRADIENT, "load_entropy", "load_max_over_mean", "routing_change", "logit_drift", "updates_lost"}


def router_gradients(model: nn.Module, family: Family, indices: list[Tensor], estimators: list[str]) -> list[Tensor]:
    """The oracle's, one a layer, where each layer has an estimator of its own."""
    truth = family.oracle(model, indices, "conventional")
    for block, index, estimator in zip(family.blocks(truth), indices, estimators, strict=True):
        block.forward = types.MethodType(family.oracle_forward(index, estimator), block)
    loss_of(truth).backward()
    return [getattr(block, family.router).weight.grad for block in family.blocks(truth)]


def expected(model: nn.Module, family: Family, estimator: str = "densemixer") -> dict[str, list[float]]:
    """A layer's conventional part is its gradient where all layers but itself have DenseMixer."""
    with selections(family, model) as indices, torch.no_grad():
        loss_of(model)
    totals = router_gradients(model, family, indices, [estimator] * len(indices))
    rests = []
    for layer in range(len(indices)):
        estimators = ["conventional" if position == layer else estimator for position in range(len(indices))]
        rests.append(router_gradients(model, family, indices, estimators)[layer])
    pairs = list(zip(totals, rests, strict=True))
    pairs.append(tuple(torch.cat([gradient.flatten() for gradient in part]) for part in (totals, rests)))
    found: dict[str, list[float]] = {name: [] for name in GRADIENT}
    for total, rest in pairs:
        added = (total - rest).norm()
        found[GRADIENT[0]].append(total.norm().item())
        found[GRADIENT[1]].append((added / (added + rest.norm())).item())
        found[GRADIENT[2]].append(F.cosine_similarity(total.flatten(), rest.flatten(), 0).item())
    return found


@pytest.mark.parametrize("estimator", ["densemixer", "centered", "conventional"])
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_gradients_are_those_of_the_oracle(name: str, estimator: str) -> None:
    family = FAMILIES[name]
    with oracle.Float64():
        model = family.build("eager").double()
        truth = expected(model, family, estimator)
        meter = RouterMeter(apply_densemixer(model, DenseMixerConfig(estimator)).layers)
        loss_of(model).backward()
    found = meter.gradients()
    for metric, values in truth.items():
        assert [*found[metric].layers, found[metric].whole] == pytest.approx(values, rel=1e-6, abs=1e-9), metric


@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_micro_batches_add_up_and_checkpointing_counts_once(kind: str) -> None:
    family = FAMILIES["qwen3_moe"]
    model = family.build()
    with selections(family, model) as indices, torch.no_grad():
        loss_of(model)
    loads = [index.flatten().bincount(minlength=8).double() for index in indices]
    with oracle.Float64():
        truth = expected(family.build("eager").double(), family)
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    meter = RouterMeter(apply_densemixer(model).layers, load=True)
    loss_of(model).backward()
    meter.discard_gradients()
    for ids in tokens().chunk(2):
        (loss_of(model, ids) / 2).backward()
    found = meter.gradients(scale=0.5)
    assert found[GRADIENT[0]].whole == pytest.approx(2 * truth[GRADIENT[0]][-1], rel=1e-4)
    assert found[GRADIENT[2]].layers == pytest.approx(truth[GRADIENT[2]][:-1], rel=1e-4)
    load = meter.load()
    for position, counts in enumerate(loads):
        p = counts / counts.sum()
        assert load["load_max_over_mean"].layers[position] == pytest.approx((8 * p.max()).item())
        assert load["load_entropy"].layers[position] == pytest.approx(-(p.xlogy(p).sum() / math.log(8)).item())
    assert load["load_entropy"].whole == pytest.approx(sum(load["load_entropy"].layers) / len(loads))
    assert math.isnan(meter.load()["load_entropy"].whole)  # counted anew
    assert meter.gradients()[GRADIENT[0]] == ([0.0] * 2, 0.0)


def test_every_architecture() -> None:
    """The norm is that of the gradient of the router's own weight, wherever a router has one."""
    measured = 0
    for folder in architectures.found():
        for cls in architectures.model_classes(folder):
            with oracle.Float64():
                model = architectures.build(folder, cls).double()
                try:
                    handle = apply_densemixer(model)
                    meter = RouterMeter(handle.layers)
                    step(model)
                except UnsupportedModelError:
                    continue
            linear = [layer for layer in handle.layers if layer.router_is_linear]
            gradients = meter.gradients()
            norms = gradients[GRADIENT[0]].layers if gradients else []
            found = [norm for norm in norms if not math.isnan(norm)]
            weights: Any = [layer.router.weight for layer in linear]
            assert found == pytest.approx([weight.grad.norm().item() for weight in weights], rel=1e-6), folder
            measured += bool(found)
    assert measured > 20


def test_a_frozen_router_has_no_gradient_metrics() -> None:
    model = FAMILIES["qwen3_moe"].build()
    model.model.layers[0].mlp.gate.requires_grad_(False)
    handle = apply_densemixer(model)
    meter = RouterMeter(handle.layers)
    loss_of(model).backward()
    metrics = named(handle.layers, meter.gradients())
    assert f"{PREFIX}layer_0/router_grad_norm" not in metrics
    assert metrics[f"{PREFIX}layer_1/router_grad_norm"] == metrics[f"{PREFIX}router_grad_norm"] > 0


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_routing_drift(name: str) -> None:
    """Against selections and logits that are looked at by hand, without the padding."""
    family = FAMILIES[name]
    model: Any = family.build()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    real = mask.flatten().bool()

    def look() -> tuple[list[Tensor], list[Tensor]]:
        logits: list[Tensor] = []
        hooks = [
            block.gate.register_forward_pre_hook(lambda gate, args: logits.append(family.logits(owner[gate], args[0])))
            for block in family.blocks(model)
        ]
        owner = {block.gate: block for block in family.blocks(model)}
        with selections(family, model) as indices, torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=mask)
        model.train()
        for hook in hooks:
            hook.remove()
        flat = [z.reshape(-1, z.shape[-1])[real] for z in logits]
        centred = [z - z.mean(-1, keepdim=True) if name == "qwen3_moe" else z for z in flat]
        return [index[real] for index in indices], centred

    routing = RoutingDrift(apply_densemixer(model).layers, model)
    assert routing.measure() == {}
    with torch.no_grad():
        model(input_ids=ids)  # not a training forward
    model(input_ids=ids, attention_mask=mask, labels=ids)
    indices, logits = look()
    assert routing.measure()["routing_change"] == routing.measure()["logit_drift"] == ([0.0] * 2, 0.0)
    with torch.no_grad():
        for block in family.blocks(model):
            block.gate.weight += 0.1 * torch.randn(block.gate.weight.shape)
    changed, moved = look()
    found = routing.measure()
    for layer in range(2):
        gone = [len(set(a) - set(b)) for a, b in zip(indices[layer].tolist(), changed[layer].tolist(), strict=True)]
        assert found["routing_change"].layers[layer] == pytest.approx(sum(gone) / indices[layer].numel()) != 0
        drift = (moved[layer] - logits[layer]).norm() / logits[layer].norm()
        assert found["logit_drift"].layers[layer] == pytest.approx(drift.item(), rel=1e-4)
    assert found["routing_change"].whole == pytest.approx(sum(found["routing_change"].layers) / 2)
    assert model.training
    assert all(module.training for module in model.modules())


class Forwards(TrainerCallback):
    """Counts the model's forwards, and keeps what reporters see and what comes after them."""

    def __init__(self, model: nn.Module) -> None:
        self.count, self.seen = 0, []
        self.hook = model.register_forward_pre_hook(self._add)

    def _add(self, model: nn.Module, args: Any) -> None:
        self.count += 1

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def trainer(model: Any, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=16).tolist()]
    settings: dict[str, Any] = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def metrics(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name.startswith(PREFIX)}


def build(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = FAMILIES["qwen3_moe"].build(attention_dropout=0.1).to(dtype)
    apply_densemixer(model, DenseMixerConfig(**options))
    return model


def test_the_trainer_logs_them_and_trains_the_same() -> None:
    own_log = Trainer.log
    trained = {}
    for on in (False, True):
        model = build()
        before, after = Forwards(model), Forwards(model)
        run = trainer(model, before, *([DenseMixerCallback()] if on else []), after)
        run.train()
        trained[on] = run, model, before, after
    (plain, plain_model, plain_forwards, _), (run, model, before, after) = trained[False], trained[True]

    first, second, end = run.state.log_history
    assert set(metrics(first)) == {f"{PREFIX}{place}{name}" for place in ("", "layer_0/", "layer_1/") for name in NAMES}
    assert metrics(second).keys() == metrics(first).keys()
    assert first["densemixer/routing_change"] > 0
    assert not metrics(end)
    for entry, other in zip(run.state.log_history, plain.state.log_history, strict=True):
        assert not metrics(other)
        assert [entry.get(name) for name in ("loss", "grad_norm")] == [
            other.get(name) for name in ("loss", "grad_norm")
        ]
    for one, other in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(one, other)

    assert metrics(before.seen[0]) == metrics(first)  # as TensorBoard sees it
    assert set(metrics(after.seen[0])) == {PREFIX + name for name in NAMES}  # as a progress bar prints it
    # One forward a micro-batch; with metrics one at the start, and one a log.
    assert (plain_forwards.count, before.count) == (8, 8 + 1 + 2)

    assert Trainer.log is own_log
    assert_nobody_watches(model, hooks=2)  # the tests'


def assert_nobody_watches(model: nn.Module, hooks: int = 0) -> None:
    assert len(model._forward_pre_hooks) == 1 + hooks  # DenseMixer's own looks for layers that come later
    layers = attached_layers(model)
    assert [layer.observer for layer in layers] == [None, None]


class Stop(TrainerCallback):
    """Ends training by an exception, in the second step."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("error", [ValueError("theirs"), KeyboardInterrupt()])
@pytest.mark.parametrize("by_hand", [False, True])
def test_nothing_is_left_where_training_ends_by_an_exception(by_hand: bool, error: BaseException) -> None:
    own_log = Trainer.log
    model = build(metrics=not by_hand)
    run = trainer(model, *([DenseMixerCallback()] if by_hand else []), Stop(error), logging_steps=1)
    for _ in range(2):  # a notebook goes on with the same Trainer
        callbacks = list(run.callback_handler.callbacks)
        with pytest.raises(type(error)) if error is not None else contextlib.nullcontext():
            run.train()
        assert Trainer.log is own_log
        assert_nobody_watches(model)
        assert run.callback_handler.callbacks == callbacks
        error = None
    assert "densemixer/router_grad_norm" in run.state.log_history[-2]


def test_metrics_that_can_not_be_measured_do_not_stop_training(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    steps = []

    def refuse(module: nn.Module, args: Any) -> None:
        """As if there was no room for one forward more, but for the one at the start."""
        if not torch.is_grad_enabled() and steps:
            raise torch.OutOfMemoryError("as if")
        steps.append(torch.is_grad_enabled())

    hook = model.register_forward_pre_hook(refuse)
    run = trainer(model, DenseMixerCallback())
    run.train()
    hook.remove()
    assert run.state.global_step == 4
    (message,) = caplog.messages
    assert "no router metrics from here on, since measuring them failed (OutOfMemoryError: as if)" in message
    assert not any(metrics(entry) for entry in run.state.log_history)
    assert_nobody_watches(model)


def test_the_gradient_norm_is_that_of_the_last_step() -> None:
    model = build()
    norms = []

    class Gates(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            norms.append(
                torch.cat([block.mlp.gate.weight.grad.flatten() for block in model.model.layers]).norm().item()
            )

    run = trainer(model, Gates(), DenseMixerCallback(), max_grad_norm=0.0)
    run.train()
    logged = [entry["densemixer/router_grad_norm"] for entry in run.state.log_history[:2]]
    assert logged == pytest.approx(norms[1::2], rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "rate", "lost"), [(torch.bfloat16, 1e-6, 1.0), (torch.bfloat16, 10.0, 0.0), (torch.float32, 1e-3, 0.0)]
)
def test_updates_lost_to_rounding(dtype: torch.dtype, rate: float, lost: float) -> None:
    run = trainer(build(dtype), DenseMixerCallback(), learning_rate=rate)
    run.train()
    assert run.state.log_history[0]["densemixer/updates_lost"] == pytest.approx(lost, abs=0.05)


@pytest.mark.parametrize(("rate", "lost"), [(1e-6, 1.0), (10.0, 0.0)])
def test_updates_lost_where_gradients_are_sparse(rate: float, lost: float) -> None:
    """As BAdam makes them, in a hook of each parameter. The Trainer itself can't clip them."""

    def to_sparse(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = parameter.grad.to_sparse()

    model = build(torch.bfloat16)
    for block in model.model.layers:
        block.mlp.gate.weight.register_post_accumulate_grad_hook(to_sparse)
    updates = LostUpdates(attached_layers(model))
    optimizer = torch.optim.SGD(model.parameters(), rate, foreach=False)
    loss_of(model).backward()
    updates.before_step(optimizer)
    optimizer.step()
    updates.after_step()
    found = updates.measure()["updates_lost"]
    assert [*found.layers, found.whole] == pytest.approx([lost] * 3, abs=0.05)


def test_updates_lost_where_the_optimizer_chooses_the_rate() -> None:
    model = build()
    run = trainer(model, DenseMixerCallback())
    run.optimizer = transformers.Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=True)
    run.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters()), lambda step: 1.0)
    run.train()
    assert run.state.log_history[0]["densemixer/updates_lost"] < 0.05


def test_a_rate_of_zero_loses_nothing() -> None:
    run = trainer(build(), DenseMixerCallback(), logging_steps=1, lr_scheduler_type="linear", warmup_steps=2)
    run.train()
    assert ["densemixer/updates_lost" in entry for entry in run.state.log_history[:2]] == [False, True]


@pytest.mark.parametrize(
    ("options", "rate", "steps", "message"),
    [
        ({}, 1e-9, 100, "0.0 % of the routers' choices changed since the start: DenseMixer is doing nothing here"),
        ({}, 1e-9, 4, ""),  # too early to say
        (
            {"estimator": "conventional"},
            0.5,
            4,
            "0.0 % of the routers' gradient is from unselected experts: DenseMixer is",
        ),
        ({}, 0.5, 4, ""),
    ],
)
def test_a_warning_where_it_does_nothing(
    options: dict[str, Any], rate: float, steps: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "densemixer"):
        # Nothing is logged before the end.
        settings = dict(max_steps=steps, logging_steps=1000, gradient_accumulation_steps=1)
        trainer(build(**options), DenseMixerCallback(), learning_rate=rate, **settings).train()
    assert len(caplog.messages) == bool(message)
    assert message in "".join(caplog.messages)


def test_a_warning_where_all_routers_are_frozen(caplog: pytest.LogCaptureFixture) -> None:
    """Their choices change all the same."""
    model = build()
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(False)
    run = trainer(model, DenseMixerCallback(), learning_rate=5.0)
    with caplog.at_level(logging.WARNING, "densemixer"):
        run.train()
    last = metrics(run.state.log_history[-2])
    assert last[f"{PREFIX}routing_change"] > 0.01
    assert last[f"{PREFIX}router_grad_norm"] == last[f"{PREFIX}layer_0/router_grad_norm"] == 0
    assert "no gradient reaches the routers: DenseMixer is doing nothing here." in caplog.messages


def test_a_model_without_densemixer_is_an_error() -> None:
    with pytest.raises(ValueError, match="DenseMixer is not attached to Qwen3MoeForCausalLM"):
        trainer(FAMILIES["qwen3_moe"].build(), DenseMixerCallback()).train()


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train", Trainer.train)
    patch_trainer(transformers.trainer)
    patch_trainer(transformers.trainer)


@pytest.mark.parametrize("estimator", ["densemixer", "conventional"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_warning_where_nobody_reads_them(asked: bool, estimator: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(metrics=asked, estimator=estimator)
    for _ in range(2):
        loss_of(model).backward()
    assert len(caplog.messages) == asked
    assert all("DenseMixer: the option metrics does nothing in this training loop" in text for text in caplog.messages)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("asked", [False, True])
def test_the_option_adds_the_callback(asked: bool, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(build(metrics=asked))
    run.train()
    assert not any("does nothing in this training loop" in text for text in caplog.messages)
    assert bool(metrics(run.state.log_history[0])) == asked
    assert not any(isinstance(callback, DenseMixerCallback) for callback in run.callback_handler.callbacks)


@pytest.mark.usefixtures("patched")
def test_the_option_does_not_add_it_twice() -> None:
    model = build(metrics=True)
    forwards = Forwards(model)
    trainer(model, forwards, DenseMixerCallback()).train()
    assert forwards.count == 8 + 1 + 2
