"""What the doors to different frameworks have in common: how a switch is read, and how a host's method is wrapped."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from densemixer_core import DenseMixerConfig
from densemixer_core.config import read_flag


def read_switch(name: str, value: Any) -> DenseMixerConfig | None:
    """The options that a switch gives which takes true, false or a mapping; None where it says no, or nothing.

    Args:
        name: What the user calls it.
        value: What it is set to; None if it isn't.

    Raises:
        ValueError: The value or an option is wrong. The message names the switch.
    """
    if value is None or value is False:
        return None
    if value is True:
        return DenseMixerConfig()
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be true, false or a mapping of options, got {value!r}{quotes(value)}")
    return read_options(name, value)


def read_options(name: str, options: Any) -> DenseMixerConfig:
    """A mapping of options.

    Raises:
        ValueError: It is none, or an option is wrong. The message names what it was given by.
    """
    try:
        return DenseMixerConfig.from_dict(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def given_options(config: Any) -> DenseMixerConfig:
    """What ``apply_densemixer`` was given; the default options for None.

    Raises:
        TypeError: It is something else.
    """
    if config is None:
        return DenseMixerConfig()
    if not isinstance(config, DenseMixerConfig):
        raise TypeError(
            f"apply_densemixer: the options must be a DenseMixerConfig, got {type(config).__name__}. Build one from a "
            "mapping by DenseMixerConfig.from_dict."
        )
    return config


def quotes(value: object) -> str:
    """The end of the message about a switch that is neither true nor false: what to do if it is so in quotes alone."""
    try:
        word = isinstance(value, str) and str(read_flag(value)).lower()
    except ValueError:
        word = ""
    return f"; write {word}, without quotes" if word else ""


def wrap(owner: Any, name: str) -> Callable[[Any], Any]:
    """A decorator that puts a function in the place of a host's, which it is given as its first argument.

    Args:
        owner: The module or class that the host's function belongs to.
        name: The function's name there. A class method stays one, and so does a static one.
    """
    found = inspect.getattr_static(owner, name)
    kind = type(found) if isinstance(found, classmethod | staticmethod) else None
    original: Any = getattr(owner, name) if kind is None else found.__func__

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        wrapped.densemixer = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped if kind is None else kind(wrapped))
        return wrapped

    return decorate


def is_wrapped(function: Any) -> bool:
    """Whether `wrap` has wrapped it, be it that others have wrapped it since: `functools.wraps` copies the mark."""
    return hasattr(function, "densemixer")


def looks_like(key: object, ours: str) -> bool:
    """Whether a key of somebody's configuration may be meant as ours, or is it: spelt nearly so, or with ``use_``."""
    return bool(difflib.get_close_matches(str(key).lower(), [ours, f"use_{ours}"], cutoff=0.8))
