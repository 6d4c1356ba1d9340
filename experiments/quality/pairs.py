"""Predicted and measured changes of the loss, of many tokens of one layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from quality.agreement import Floats
from quality.forcing import Effects
from torch import Tensor

EFFECTS = {1.0: "add", 0.1: "add 1/10", 0.001: "add 1/1000"}
SWAP = "swap"
"""The names that a reader sees: an unselected expert joins, with its whole score or a share, or replaces another."""


class Token(NamedTuple):
    """One token; values are by effect, and by estimator.

    Attributes:
        sequence: Where it is from.
        predicted, measured: In nats, [experts - k].
        logits: The gradient of the router's logits, [experts], also with the measured changes as that of the scores.
        x: The router's input, [hidden].
    """

    sequence: int
    predicted: dict[str, dict[str, Floats]]
    measured: dict[str, Floats]
    logits: dict[str, Floats]
    x: Floats


class Pairs(NamedTuple):
    """Many tokens, stacked: fields as those of `Token`, with a first dimension [tokens]."""

    sequences: NDArray[np.int64]
    predicted: dict[str, dict[str, Floats]]
    measured: dict[str, Floats]
    logits: dict[str, Floats]
    x: Floats


def token(
    sequence: int, measured: Effects, predicted: dict[str, Effects], logits: dict[str, Tensor], x: Tensor
) -> Token:
    """From what `forcing` returns. What is predicted of a share is that share of what is predicted of the whole."""
    return Token(
        sequence,
        {
            **{
                EFFECTS[share]: {name: share * _numbers(effects.added[1.0]) for name, effects in predicted.items()}
                for share in measured.added
            },
            SWAP: {name: _numbers(effects.swapped) for name, effects in predicted.items()},
        },
        {
            **{EFFECTS[share]: _numbers(change) for share, change in measured.added.items()},
            SWAP: _numbers(measured.swapped),
        },
        {name: _numbers(gradient) for name, gradient in logits.items()},
        _numbers(x),
    )


def stack(tokens: list[Token]) -> Pairs:
    """Those of one layer, or of several with equally many experts."""
    first = tokens[0]
    return Pairs(
        np.array([token.sequence for token in tokens]),
        {
            effect: {name: np.stack([token.predicted[effect][name] for token in tokens]) for name in estimators}
            for effect, estimators in first.predicted.items()
        },
        {effect: np.stack([token.measured[effect] for token in tokens]) for effect in first.measured},
        {name: np.stack([token.logits[name] for token in tokens]) for name in first.logits},
        np.stack([token.x for token in tokens]),
    )


def _numbers(tensor: Tensor) -> Floats:
    return np.asarray(tensor.double().cpu().numpy())
