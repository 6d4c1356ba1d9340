"""Many threads on one model, and what may happen to a model in any order: every gradient is the right one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracle
import pytest
import torch
from blocks import collected, replica
from failures import FAILURES, failing
from families import FAMILIES, Family, tokens
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, precondition, rule
from lora import lora_config, one_adapter_only, truth_of, wrapped
from runs import loss_of, selections
from torch import Tensor, nn

from densemixer_adapters.transformers import DenseMixerHandle, apply_densemixer, attached_layers
from densemixer_core import DenseMixerConfig

THREADS, STEPS = 4, 200


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3_moe", DenseMixerConfig("centered")),
        ("gpt_oss", DenseMixerConfig()),
        ("deepseek_v3", DenseMixerConfig("centered", budget=0.5)),
    ],
)
def test_threads(family: str, config: DenseMixerConfig) -> None:
    """Two train the model itself, two a replica for each step, and all evaluate now and then."""
    model: Any = FAMILIES[family].build()
    batches = [tokens(1, 4 + number, seed=number) for number in range(5)]
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.autograd.grad(loss_of(model, ids), parameters, materialize_grads=True)
        return found

    start = threading.Barrier(THREADS)

    def work(thread: int) -> int:
        start.wait(timeout=60)
        for step in range(STEPS):
            number = (thread + step) % len(batches)
            trained = replica(model) if thread % 2 else model
            found = gradients(trained, batches[number])
            for name, ours, alone in zip(names, found, expected[number], strict=True):
                assert torch.equal(ours, alone), f"thread {thread}, step {step}: {name}"
            if step % 8 == 0:
                with torch.no_grad():
                    assert torch.equal(loss_of(trained, batches[number]), losses[number])
        return STEPS

    with torch.no_grad():
        losses = [loss_of(model, ids) for ids in batches]
    with apply_densemixer(model, config):
        expected = [gradients(model, ids) for ids in batches]
        with ThreadPoolExecutor(THREADS) as pool:
            assert sum(pool.map(work, range(THREADS))) == THREADS * STEPS


BATCHES = [tokens(1, 5, seed=1), tokens(2, 3, seed=2), tokens(1, 9, seed=3)]


class Subject:
    """A kind of model. Its copies, in the machine below, differ in their ``version`` and so in their weights.

    ``adapters`` are the names that may be active, None for the model without adapters.
    """

    def __init__(self, family: str, adapters: tuple[str | None, ...] = (None,)) -> None:
        self.family: Family = FAMILIES[family]
        self.adapters = adapters
        self.truth = functools.cache(self._truth)
        self.loss = functools.cache(self._loss)

    def build(self) -> Any:
        model: Any = self.family.build("eager")
        if self.adapters == (None,):
            return model
        model = wrapped(self.family, model, "experts", "modules_to_save")
        for name in self.adapters:
            if name not in (None, "default"):
                model.add_adapter(name, lora_config(self.family, "experts", "modules_to_save"))
        model.enable_input_require_grads()  # for reentrant checkpointing
        return model

    def change(self, model: nn.Module) -> None:
        """From a version to the next."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad or "lora_" in name or "modules_to_save" in name:
                    parameter.mul_(0.9 if ".mlp." in name else 1.1)

    def _plain(self, version: int, adapter: str | None) -> Any:
        model = self.build()
        for _ in range(version):
            self.change(model)
        activate(model, adapter)
        return model

    def _loss(self, version: int, adapter: str | None, batch: int) -> Tensor:
        """The host's."""
        with torch.no_grad():
            return loss_of(self._plain(version, adapter), BATCHES[batch])

    def _truth(self, version: int, adapter: str | None, batch: int, estimator: str) -> dict[str, Tensor]:
        """The oracle's gradients."""
        model = self._plain(version, adapter)
        with selections(self.family, model) as indices, torch.no_grad():
            loss_of(model, BATCHES[batch])
        dense = truth_of(self.family, model, indices, estimator)
        with oracle.Float64():
            loss_of(dense, BATCHES[batch]).backward()
        return collected(dense)


def activate(model: Any, adapter: str | None) -> None:
    if adapter is not None:
        model.set_adapter(adapter)


@dataclasses.dataclass(eq=False)
class Trained:
    """A model of the machine, and what has been done to it. ``estimator`` is "conventional" where nothing is attached;
    ``handle`` is None there, and where a copy brought its layers along."""

    model: Any
    version: int
    adapter: str | None
    estimator: str = "conventional"
    handle: DenseMixerHandle | None = None
    recomputes: bool = False
    waiting: int = 0  # forwards whose backward, which is yet to come, runs the model again


@dataclasses.dataclass(eq=False)
class Forward:
    of: Trained
    loss: Tensor
    adapter: str | None
    recomputed: bool
    expected: dict[str, Tensor]


class Interleavings(RuleBasedStateMachine):
    """Forwards and backwards of a model and its copies, and between them whatever one may do to a model."""

    subject: Subject

    models = Bundle("models")
    forwards = Bundle("forwards")

    @initialize(target=models, estimator=st.sampled_from(["densemixer", "centered"]))
    def first_model(self, estimator: str) -> Trained:
        adapter = self.subject.adapters[0]
        trained = Trained(self.subject.build(), 0, adapter)
        activate(trained.model, adapter)
        self.count = 0
        self._attach(trained, estimator)
        return trained

    @rule(target=forwards, trained=models, batch=st.integers(0, len(BATCHES) - 1))
    def forward(self, trained: Trained, batch: int) -> Forward:
        loss = loss_of(trained.model, BATCHES[batch])
        key = trained.version, trained.adapter, batch
        assert torch.equal(loss, self.subject.loss(*key))
        trained.waiting += trained.recomputes
        return Forward(trained, loss, trained.adapter, trained.recomputes, self.subject.truth(*key, trained.estimator))

    @rule(done=consumes(forwards))
    def backward(self, done: Forward) -> None:
        trained = done.of
        trained.waiting -= done.recomputed
        activate(trained.model, done.adapter)  # which trains those parameters
        trained.model.zero_grad()
        done.loss.backward()
        activate(trained.model, trained.adapter)
        ours = collected(trained.model)
        assert ours.keys() == done.expected.keys()
        for name, truth in done.expected.items():
            assert oracle.worst_error(ours[name], truth) <= 2e-5, name

    @rule(trained=models, batch=st.integers(0, len(BATCHES) - 1))
    def evaluation(self, trained: Trained, batch: int) -> None:
        with torch.no_grad():
            loss = loss_of(trained.model, BATCHES[batch])
        assert torch.equal(loss, self.subject.loss(trained.version, trained.adapter, batch))

    @rule(
        trained=models,
        fail=st.sampled_from(FAILURES),
        error=st.sampled_from([torch.OutOfMemoryError, KeyboardInterrupt]),
        gradients=st.booleans(),
    )
    def failure(self, trained: Trained, fail: Any, error: type[BaseException], gradients: bool) -> None:
        with torch.set_grad_enabled(gradients), failing(self.subject.family, trained.model, fail, error):
            loss_of(trained.model, BATCHES[0])

    @precondition(lambda self: self.count < 3)
    @rule(target=models, trained=models)
    def deepcopy(self, trained: Trained) -> Trained:
        self.count += 1
        model = copy.deepcopy(trained.model)
        self.subject.change(model)
        return dataclasses.replace(trained, model=model, version=trained.version + 1, handle=None, waiting=0)

    @rule(trained=models)
    def removal(self, trained: Trained) -> None:
        if trained.handle is None or trained.waiting:
            return
        trained.handle.remove()
        trained.handle, trained.estimator = None, "conventional"
        assert not attached_layers(trained.model)

    @rule(trained=models, estimator=st.sampled_from(["densemixer", "centered"]))
    def attach(self, trained: Trained, estimator: str) -> None:
        if trained.handle is not None:
            with pytest.raises(RuntimeError, match="attached already"):
                apply_densemixer(trained.model)
        elif not trained.waiting:
            self._attach(trained, estimator)

    @precondition(lambda self: len(self.subject.adapters) > 1)
    @rule(trained=models, data=st.data())
    def another_adapter(self, trained: Trained, data: st.DataObject) -> None:
        if not trained.waiting:
            trained.adapter = data.draw(st.sampled_from(self.subject.adapters))
            activate(trained.model, trained.adapter)

    @rule(trained=models, kind=st.sampled_from(["none", "reentrant", "non-reentrant"]))
    def checkpointing(self, trained: Trained, kind: str) -> None:
        trained.recomputes = kind != "none"
        if kind == "none":
            trained.model.gradient_checkpointing_disable()
            return
        options = {"use_reentrant": kind == "reentrant"}
        trained.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def _attach(self, trained: Trained, estimator: str) -> None:
        trained.handle, trained.estimator = apply_densemixer(trained.model, DenseMixerConfig(estimator)), estimator
        assert attached_layers(trained.model) == trained.handle.layers


def machine(name: str, subject: Subject) -> Any:
    case = type(name, (Interleavings,), {"subject": subject}).TestCase
    case.settings = settings(
        max_examples=30,
        stateful_step_count=30,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # to shrink what fails takes many times as long
    )
    return case


TestPlain = machine("TestPlain", Subject("qwen3_moe"))
TestSharedExpert = machine("TestSharedExpert", Subject("deepseek_v3"))
TestAdapters = machine("TestAdapters", Subject("gpt_oss", ("default",) if one_adapter_only() else ("default", "other")))
