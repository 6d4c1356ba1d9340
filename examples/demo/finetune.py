"""One arm of the comparison: fine-tune the start model, with or without DenseMixer, and measure on the way."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import model as start_model
import torch
from batches import Batch, collate, encode, schedule
from data import Example
from probe import Probe
from results import MEMORY_STEPS, Run
from settings import DemoError, Settings
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_cosine_schedule_with_warmup

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_core import DenseMixerConfig

HELD_OUT_EXAMPLES = 64
PROBES = 10


def fine_tune(train: list[Example], held_out: list[Example], settings: Settings, densemixer: bool) -> Run:
    """Fine-tune all weights. To be called in a process of its own, for peak memory is that of the process.

    Raises:
        DemoError: The data can't be used, or the model, e.g. for it has no Mixture-of-Experts layers.
    """
    settings = start_model.on_device(settings)
    model, tokenizer = start_model.load(settings)
    config = DenseMixerConfig(estimator=settings.estimator)
    try:
        apply_densemixer(model, config).remove()
    except UnsupportedModelError as error:
        raise DemoError(f"{settings.model}: {error}") from None

    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    examples = encode(train, tokenizer, settings.max_length, settings.steps * settings.batch_size)
    held_out_examples = encode(held_out, tokenizer, settings.max_length, HELD_OUT_EXAMPLES)
    batches = schedule(examples, settings.steps, settings.batch_size, pad_id, settings.seed)
    held_out_batches = [
        collate(held_out_examples[first : first + settings.batch_size], pad_id).to(settings.device)
        for first in range(0, len(held_out_examples), settings.batch_size)
    ]

    # The probe runs DenseMixer in both arms, so memory is measured before it, on weights that are thrown away.
    longest = max(batches, key=lambda batch: batch.input_ids.shape[1])
    list(Trainer(model, settings, densemixer).train([longest] * MEMORY_STEPS))
    peak_mib = _peak_mib(settings.device)
    del model

    model, _ = start_model.load(settings)
    trainer = Trainer(model, settings, densemixer)
    probe = Probe(model, held_out_batches, config)
    run = Run(
        arm="DenseMixer" if densemixer else "conventional",
        train_loss=[],
        step_seconds=[],
        measurements=[probe.measure(0)],
        peak_mib=peak_mib,
        examples=len(examples),
        held_out_examples=len(held_out_examples),
        device=settings.device,
        hardware=_hardware(settings.device),
    )
    every = math.ceil(settings.steps / PROBES)
    with tqdm(total=settings.steps, desc=run.arm, unit="step", disable=None) as progress:
        for first in range(0, settings.steps, every):
            for loss, seconds in trainer.train(batches[first : first + every]):
                run.train_loss.append(loss)
                run.step_seconds.append(seconds)
                progress.update()
                progress.set_postfix(loss=f"{loss:.2f}")
            run.measurements.append(probe.measure(len(run.train_loss)))
    return run


class Trainer:
    """AdamW with a cosine schedule, as one would fine-tune anyway; DenseMixer is attached to the model or not."""

    def __init__(self, model: Any, settings: Settings, densemixer: bool) -> None:
        self._model = model
        self._device = settings.device
        self._config = DenseMixerConfig(estimator=settings.estimator) if densemixer else None
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        self._scheduler = get_cosine_schedule_with_warmup(self._optimizer, settings.steps // 20, settings.steps)

    def train(self, batches: list[Batch]) -> Iterator[tuple[float, float]]:
        """Yield the loss and the duration, in seconds, of each step."""
        self._model.train()
        attached = apply_densemixer(self._model, self._config) if self._config else contextlib.nullcontext()
        with attached:
            for batch in batches:
                start = time.perf_counter()
                loss = self._step(batch.to(self._device))
                yield loss, time.perf_counter() - start

    def _step(self, batch: Batch) -> float:
        loss = self._model(**batch._asdict(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), max_norm=1.0)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return float(loss.item())


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
