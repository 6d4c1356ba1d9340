"""Means over seeds with confidence intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One arm less another on the same seeds: the mean difference, its interval, and the paired t-test's p-value."""

    difference: Interval
    p: float


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its interval by Student's t; the values are independent."""
    mean = fmean(values)
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """The i-th value of both comes from the same seed. p is 1 where all differences are zero."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    p = float(stats.ttest_rel(values, baseline).pvalue) if any(differences) else 1.0
    return Comparison(mean_interval(differences), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many they are (Holm, "A simple sequentially rejective multiple test procedure", 1979).

    That any of the hypotheses that are true is rejected at level α then has at most probability α.
    """
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return [float(p) for p in corrected]
