"""The options of DenseMixer."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from densemixer_core.estimators import ESTIMATORS

ENVIRONMENT_PREFIX = "DENSEMIXER_"
NO_OPTIONS = ("BOOT", "ENABLED", "LOG_LEVEL", "MODELS", "OLMOE", "QWEN2", "QWEN3")
"""The names of the adapters' own variables, after the prefix."""

LARGEST_WORKSPACE = sys.maxsize >> 20
"""MiB that this machine can address."""

_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on", "t"), True),
    **dict.fromkeys(("0", "false", "no", "off", "f"), False),
}


def read_flag(text: str) -> bool:
    """What an environment variable that is a switch says.

    Raises:
        ValueError: It is no word for on or off.
    """
    word = text.strip().lower()
    if word not in _WORDS:
        raise ValueError("must be 1 or 0")
    return _WORDS[word]


def _number(read: Callable[[str], float]) -> Callable[[str], float | str]:
    """Text that is no number stays what it is, and the field says what is wrong."""

    def number(text: str) -> float | str:
        with contextlib.suppress(ValueError):
            return read(text)
        return text

    return number


_READERS: dict[str, Callable[[str], Any]] = {
    "workspace_mb": _number(int),
    "budget": _number(float),
    "seed": _number(int),
    "metrics": read_flag,
}
"""The fields that are no strings, and how to read them from text."""

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?[1-9]\d*)?)?")


@dataclasses.dataclass(frozen=True)
class DenseMixerConfig:
    """What DenseMixer does to the layers that it is attached to.

    Args:
        estimator: The gradient that the scores of unselected experts receive, one of
            `densemixer_core.estimators.ESTIMATORS`. ``"conventional"`` is training without DenseMixer.
        workspace_mb: Upper bound, in MiB, on the temporaries of one layer's extra backward pass. It works on as many
            tokens at a time as fit, and on at least one. Under autocast, copies of the layer's input, of the gradient
            of its output and of one expert's weights in the dtype of autocast come on top.
        layers: Which of the model's Mixture-of-Experts layers to train this way, None for all. Positions among these
            layers in their order, negative ones from the end, e.g. ``[0, 3, -1]``; or the same, or a Python slice, as
            a string: ``"0,3,-1"``, ``"-4:"`` for the last four, ``"::2"`` for every other one.
        budget: The share of the (token, unselected expert) pairs that are evaluated, above 0 and at most 1. Below 1 the
            pairs are drawn by importance and the others estimated, so that the extra gradient is exact in the mean and
            costs that share, see `densemixer_core.control`.
        seed: Chooses the draws for a budget below 1. The same seed and data give the same draws.
        metrics: Whether adapters report router metrics in the framework's log. The method itself doesn't look at it.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is out of range.
    """

    estimator: str = "densemixer"
    workspace_mb: int = 256
    layers: Sequence[int] | str | None = None
    budget: float = 1.0
    seed: int = 0
    metrics: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, str):
            raise TypeError(f"estimator must be a string, got {self.estimator!r}")
        if self.estimator not in ESTIMATORS:
            hint = did_you_mean(self.estimator, ESTIMATORS)
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {self.estimator!r}{hint}")
        if type(self.workspace_mb) is not int:
            raise TypeError(f"workspace_mb must be an integer (MiB), got {self.workspace_mb!r}")
        if not 1 <= self.workspace_mb <= LARGEST_WORKSPACE:
            raise ValueError(f"workspace_mb must be at least 1 (MiB) and at most {LARGEST_WORKSPACE}")
        if type(self.budget) not in (int, float):
            raise TypeError(f"budget must be a number such as 0.125, got {self.budget!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1 (1 evaluates all experts), got {self.budget}")
        if type(self.seed) is not int:
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        if type(self.metrics) is not bool:
            raise TypeError(f"metrics must be true or false, got {self.metrics!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", _canonical_layers(self.layers))

    def positions(self, count: int) -> Sequence[int]:
        """The positions in ``range(count)`` that `layers` selects.

        Raises:
            ValueError: `layers` names a position that a model with ``count`` layers doesn't have, or selects none.
        """
        if self.layers is None:
            return range(count)
        if isinstance(self.layers, str):
            chosen = slice(*(int(bound) if bound else None for bound in self.layers.split(":")))
            inside = all(bound is None or -count <= bound <= count for bound in (chosen.start, chosen.stop))
            positions = sorted(range(count)[chosen])
        else:
            inside = all(-count <= position < count for position in self.layers)
            positions = sorted({position % count for position in self.layers}) if count else []
        if not inside or not positions:
            reason = "selects none" if inside else "goes beyond them"
            raise ValueError(f"layers={self.layers!r}: the model has {count} Mixture-of-Experts layers, this {reason}")
        return positions

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> DenseMixerConfig:
        """Build from a mapping such as a section of a YAML file.

        Raises:
            TypeError: ``options`` is not a mapping, or a value is of the wrong type.
            ValueError: A key is unknown or a value is out of range. The message names it.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"the options of DenseMixer must be a mapping, got {options!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                hint = did_you_mean(str(key), known)
                raise ValueError(f"unknown option of DenseMixer: {key!r}{hint} (known: {', '.join(known)})")
        return cls(**options)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> DenseMixerConfig:
        """Build from the variables ``DENSEMIXER_<FIELD>``, e.g. ``DENSEMIXER_ESTIMATOR=centered``.

        A field whose variable is unset or empty keeps its default.

        Raises:
            ValueError: A variable's value is invalid, or a name with this prefix is unknown. The message names the
                variable.
        """
        environ = os.environ if environ is None else environ
        _check_names(environ, (*(field.name.upper() for field in dataclasses.fields(cls)), *NO_OPTIONS))
        options: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = ENVIRONMENT_PREFIX + field.name.upper()
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                options[field.name] = _READERS.get(field.name, str)(text)
                cls(**{field.name: options[field.name]})
            except (TypeError, ValueError) as error:
                raise ValueError(f"environment variable {variable}={text!r}: {error}") from error
        return cls(**options)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message on a word that isn't known: the known one that is like it, if there is one."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_names(environ: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise a ValueError if a variable has our prefix and is none of ours: misspelt, it would change nothing."""
    unknown = []
    for variable in sorted(environ):
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name != variable and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            unknown.append(f"{variable} (did you mean {ENVIRONMENT_PREFIX}{close[0]}?)" if close else variable)
    if unknown:
        known = ", ".join(ENVIRONMENT_PREFIX + name for name in sorted(names))
        raise ValueError(f"unknown environment variable of DenseMixer: {', '.join(unknown)}; known: {known}")


def _canonical_layers(layers: Any) -> tuple[int, ...] | str:
    """A slice as a string, anything else as a tuple: the options stay hashable."""
    wanted = f"layers must be a list of positions such as [0, -1] or a slice in quotes such as '-4:', got {layers!r}"
    if isinstance(layers, str):
        text = "".join(layers.split())
        if _SLICE.fullmatch(text):
            return text
        try:
            return tuple(int(position) for position in text.split(","))
        except ValueError:
            raise ValueError(wanted) from None
    if not isinstance(layers, Sequence) or not all(type(position) is int for position in layers):
        raise TypeError(wanted)
    if not layers:
        raise ValueError(f"{wanted}: it selects no layer; switch DenseMixer off instead")
    return tuple(layers)
