"""How well predicted changes of the loss agree with the measured ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from common.significance import CONFIDENCE, Interval
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
RESAMPLES = 1000


class Agreement(NamedTuple):
    """All with intervals from resampling whole sequences, for tokens of a sequence aren't independent.

    Attributes:
        cosine: Between prediction and measurement over a token's unselected experts, mean over tokens.
        rank: Spearman's correlation over a token's unselected experts, mean over tokens.
        sign: The share of all pairs of a token and an expert in which both have the same sign.
        slope, intercept: Of the least-squares line from prediction to measurement, over all pairs.
        r_squared: The share of the measurements' variance that this line explains.
        favourite: Mean measured change, in nats, for the expert that is predicted to be the best one for its token.
    """

    cosine: Interval
    rank: Interval
    sign: Interval
    slope: Interval
    intercept: Interval
    r_squared: Interval
    favourite: Interval


def agreement(predicted: Floats, measured: Floats, sequences: NDArray[np.int64], seed: int = 0) -> Agreement:
    """Compare [tokens, experts] predictions and measurements; ``sequences`` says where each token is from, [tokens].

    A prediction that is the same for all experts of a token ranks none: it has the rank correlation 0, and as its
    favourite's change counts the mean over experts.
    """
    best = predicted == predicted.min(1, keepdims=True)
    by_token = np.stack(
        [
            cosines(predicted, measured),
            cosines(_centred_ranks(predicted), _centred_ranks(measured)),
            (np.sign(predicted) == np.sign(measured)).mean(1),
            (best * measured).sum(1) / best.sum(1),
            # Sums for the line.
            predicted.mean(1),
            measured.mean(1),
            (predicted**2).mean(1),
            (predicted * measured).mean(1),
            (measured**2).mean(1),
        ],
        1,
    )

    def measures(means: Floats) -> Floats:
        """[..., 7] from means over tokens, [..., 9], in the order of `Agreement`."""
        cosine, rank, sign, favourite, x, y, xx, xy, yy = np.moveaxis(means, -1, 0)
        spread, both = xx - x**2, xy - x * y
        slope = np.divide(both, spread, out=np.zeros_like(both), where=spread > 1e-12 * xx)
        return np.stack([cosine, rank, sign, slope, y - slope * x, slope * both / (yy - y**2), favourite], -1)

    return Agreement(*_bootstrap(by_token, sequences, measures, seed))


def mean_by_token(values: Floats, sequences: NDArray[np.int64], seed: int = 0) -> Interval:
    """The mean of a number for each token, [tokens]."""
    return _bootstrap(values[:, None], sequences, lambda means: means, seed)[0]


def _bootstrap(
    by_token: Floats, sequences: NDArray[np.int64], measures: Callable[[Floats], Floats], seed: int
) -> list[Interval]:
    """Measures of the means over tokens, and their percentile intervals; all sequences have equally many tokens."""
    _, groups = np.unique(sequences, return_inverse=True)
    by_sequence = np.stack([by_token[groups == group].mean(0) for group in range(groups.max() + 1)])
    low, high = _percentiles(measures(by_sequence[_draws(len(by_sequence), seed)].mean(1)))
    return [Interval(*map(float, row)) for row in zip(measures(by_sequence.mean(0)), low, high, strict=True)]


def _draws(count: int, seed: int) -> NDArray[np.int64]:
    """Which of the sequences each resampling takes, [resamples, sequences]."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _percentiles(resampled: Floats) -> Floats:
    """Both ends of the interval, [2, ...], of [resamples, ...]."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return np.asarray(np.percentile(resampled, [tail, 100 - tail], axis=0))


def cosines(one: Floats, other: Floats) -> Floats:
    """Row by row, of [rows, numbers]; 0 where one is zero."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide((one * other).sum(1), norms, out=np.zeros(len(one)), where=norms > 0)


def _centred_ranks(values: Floats) -> Floats:
    ranks = rankdata(values, axis=1)
    return np.asarray(ranks - ranks.mean(1, keepdims=True))


def cosine_of_sums(one: Floats, other: Floats, seed: int = 0) -> Interval:
    """The cosine between the sums over sequences of two gradients, [sequences, numbers] each."""
    counts = np.stack([np.bincount(draw, minlength=len(one)) for draw in _draws(len(one), seed)]).astype(np.float64)
    low, high = _percentiles(cosines(counts @ one, counts @ other))
    whole = cosines(one.sum(0, keepdims=True), other.sum(0, keepdims=True))
    return Interval(float(whole[0]), float(low), float(high))
