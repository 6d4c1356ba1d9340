"""The options of DenseMixer."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

from densemixer_core.estimators import ESTIMATORS

ENVIRONMENT_PREFIX = "DENSEMIXER_"


@dataclasses.dataclass(frozen=True)
class DenseMixerConfig:
    """What DenseMixer does to the layers that it is attached to.

    Args:
        estimator: The gradient that the scores of unselected experts receive, one of
            `densemixer_core.estimators.ESTIMATORS`. ``"conventional"`` is training without DenseMixer.
        workspace_mb: Upper bound, in MiB, on the temporaries of one layer's extra backward pass. It works on as many
            tokens at a time as fit, and on at least one. Under autocast, copies of the layer's input, of the gradient
            of its output and of one expert's weights in the dtype of autocast come on top.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is out of range.
    """

    estimator: str = "densemixer"
    workspace_mb: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, str):
            raise TypeError(f"estimator must be a string, got {self.estimator!r}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {self.estimator!r}")
        if not isinstance(self.workspace_mb, int) or isinstance(self.workspace_mb, bool):
            raise TypeError(f"workspace_mb must be an integer (MiB), got {self.workspace_mb!r}")
        if self.workspace_mb < 1:
            raise ValueError(f"workspace_mb must be at least 1 (MiB), got {self.workspace_mb}")

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
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown option of DenseMixer: {key!r}{hint} (known: {', '.join(known)})")
        return cls(**options)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> DenseMixerConfig:
        """Build from the variables ``DENSEMIXER_<FIELD>``, e.g. ``DENSEMIXER_ESTIMATOR=centered``.

        A field whose variable is unset or empty keeps its default.

        Raises:
            ValueError: A variable's value is invalid. The message names the variable.
        """
        environ = os.environ if environ is None else environ
        options: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = ENVIRONMENT_PREFIX + field.name.upper()
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                options[field.name] = int(text) if isinstance(field.default, int) else text
                cls(**{field.name: options[field.name]})
            except ValueError as error:
                raise ValueError(f"environment variable {variable}={text!r}: {error}") from error
        return cls(**options)
