"""What a user is told of a model: a line that says what is attached to it, and warnings of what has no effect."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from densemixer_adapters.transformers.cost import extra_operations
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_core import DenseMixerConfig

logger = logging.getLogger("densemixer")

UNREAD_METRICS = (
    "DenseMixer: the option metrics does nothing in this training loop, where nobody reads router metrics. The Trainer "
    "of transformers logs them if it has densemixer_adapters.callback.DenseMixerCallback() among its callbacks, or "
    "under DENSEMIXER_ENABLED=1; and so do LLaMA-Factory, Axolotl and verl with the option set there. Otherwise leave "
    "it out."
)
OVERFLOW = (
    "DenseMixer: for some tokens the output of an expert that wasn't selected doesn't fit into float16, first in "
    "{name}. Such a pair of a token and an expert counts as nothing, as in conventional training. Router metrics count "
    "them as pairs_left_out. bfloat16 has no such limit."
)
LOST_GRADIENT = (
    "DenseMixer has nothing to train where a router's output has no gradient though the router isn't frozen, first in "
    "{name}: such a layer trains as without DenseMixer. A router of your own must not detach its logits."
)
CHANGED_EXPERTS = (
    "DenseMixer: weights of experts were written to in place between the forward of their layer and its backward, "
    "first in {name}. The gradient that DenseMixer adds is that of the weights as they are in the backward."
)
LATECOMER = (
    "DenseMixer: {name} has come into the model after DenseMixer was attached to it, and trains as without DenseMixer. "
    "Change the model first, or call handle.remove() and apply_densemixer again."
)


def describe(model: Any, layers: Sequence[DenseMixerLayer]) -> str:
    """What is attached, to how many layers, with which options, and what it costs, as things are now.

    Args:
        model: The model.
        layers: Its layers that DenseMixer is attached to, at least one.
    """
    config = layers[0].config
    trainable = sum(not layer.router_is_frozen for layer in layers)
    frozen = "" if trainable == len(layers) else f", of which {trainable} have a router that isn't frozen"
    return (
        f"DenseMixer is attached to {len(layers)} layer{'s' * (len(layers) != 1)} of {type(model).__name__} "
        f"({getattr(getattr(model, 'config', None), 'model_type', 'no model type')}){frozen}: {_options(config)}, "
        f"{1e-9 * extra_operations(model, layers):.4g} GFLOP more a token in the backward"
    )


def announce(text: str) -> None:
    """Log a line at ``info``, on the first rank."""
    logger.log(logging.INFO if _is_first_rank() else logging.DEBUG, text)


def warn(text: str) -> None:
    """Log a warning, on the first rank."""
    logger.log(logging.WARNING if _is_first_rank() else logging.DEBUG, text)


def show_log(level: str | None) -> None:
    """Have the logger ``densemixer`` heard: on standard error, where logging isn't set up to show its records.

    Args:
        level: From which on; None for ``info``, unless the program has set one.
    """
    if level is not None or logger.level == logging.NOTSET:
        logger.setLevel(level or logging.INFO)
    if not any(isinstance(handler, _LastResort) for handler in logger.handlers):
        logger.addHandler(_LastResort())
    if not any(isinstance(found, _BeforeFilters) for found in logger.filters):
        logger.filters.insert(0, _BeforeFilters())


def _options(config: DenseMixerConfig) -> str:
    """The estimator, and what isn't as by default."""
    fields = [field for field in dataclasses.fields(config) if field.name != "estimator"]
    changed = [f"{field.name} {value}" for field in fields if (value := getattr(config, field.name)) != field.default]
    return ", ".join([f"estimator {config.estimator}", *changed])


def _is_first_rank() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    rank = os.environ.get("RANK", "")
    return not rank.isdigit() or int(rank) == 0  # some programs use the name for something else


class _LastResort(logging.Handler):
    """Prints to standard error what no other handler shows. One that is there may have a level or a filter."""

    def emit(self, record: logging.LogRecord) -> None:
        source: logging.Logger | None = logger
        while source is not None:
            for handler in source.handlers:
                silent = isinstance(handler, _LastResort | logging.NullHandler)
                if not silent and record.levelno >= handler.level and handler.filter(record):
                    return
            source = source.parent if source.propagate else None
        _print(record)


class _BeforeFilters(logging.Filter):
    """Prints to standard error what another filter of the logger is about to drop, which no handler gets to see.

    Some programs have a class of loggers that lets their own ones' records through alone.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        others = logging.Filterer()
        others.filters = [found for found in logger.filters if found is not self]
        if not others.filter(record):
            _print(record)
        return True


def _print(record: logging.LogRecord) -> None:
    print(logging.Formatter().format(record), file=sys.stderr, flush=True)
