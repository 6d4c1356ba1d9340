"""What a preflight says, in one sentence.

It says what can be known before training: whether the routing would move at all, and whether what moves it is signal.
That routing moves, and by a signal, doesn't make a model better: EVIDENCE.md has measured models where it didn't.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from densemixer_adapters.metrics.gradients import Measured
from densemixer_adapters.metrics.verdict import CHANGE_THRESHOLD, Verdict, percent
from densemixer_adapters.preflight.result import Estimated

AGREEMENT_THRESHOLD = 0.1
"""The cosine of halves from which on they show a signal: a ninth of the square of the noise in a half, then.

A rule of thumb, as is the next."""
GAIN_THRESHOLD = 0.01
"""What all best swaps together must gain, in nats a token, to be worth training for: the smallest effect that our own
experiments would care about. Since it is hindsight, and no more than the first order, a router gains less."""
SURE = 10
"""The estimate of how much routing changes is right to an order of magnitude: so far below a threshold, it is below."""

NO_BOUND = 0.995
"""A bound on what changes, of which a share so large says nothing."""

MAYBE = "whether models become better, a control run must say"


def main_estimator(estimators: Mapping[str, Estimated]) -> str:
    """The one that the verdict speaks of: ``centered``, where it differs from ``densemixer``."""
    return "centered" if "centered" in estimators else "densemixer"


def judge(
    frozen: bool,
    steps: int,
    learning_rate: float,
    tokens: float,
    at_most: Measured,
    best_swap: Measured,
    estimators: Mapping[str, Estimated],
) -> Verdict:
    """See `Preflight` for what is given. ``works`` is whether the routing would move, by a signal."""
    if frozen:
        return Verdict(
            False,
            "all routers are frozen, so none of them would train and DenseMixer would do nothing; the numbers are what "
            "would be if they were trained in full",
        )
    name = main_estimator(estimators)
    found = estimators[name]
    change, agreement, lost = found.change.whole, found.agreement.whole, found.lost.whole
    run = f"{steps} steps at {learning_rate:g}"
    rounding = f", with {percent(lost)} of their updates lost to rounding" if lost > 0.5 else ""
    bound = f", at most {percent(at_most.whole)}" if at_most.whole < NO_BOUND else ""  # NaN where there is none
    if at_most.whole < CHANGE_THRESHOLD:
        return Verdict(
            False, f"routers would leave the routing as it is: {run} change {percent(at_most.whole)} at most{rounding}"
        )
    if change < CHANGE_THRESHOLD / SURE:
        return Verdict(
            False, f"routers would leave the routing as it is: {run} change about {percent(change)}{bound}{rounding}"
        )
    moved = f"{run} would change about {percent(change)} of the choices{bound}{rounding}"
    if change < CHANGE_THRESHOLD:
        return Verdict(None, f"routers would hardly move the routing: {moved}")
    if not agreement >= AGREEMENT_THRESHOLD:
        return Verdict(
            None,
            f"routers would move the routing, but these batches show no signal that would: {moved}, and the gradient "
            f"of {name} has a cosine of {agreement:.2f} between halves of them; {_needed(found.noise_tokens, tokens)}",
        )
    signal = f"the gradient of {name} has a cosine of {agreement:.2f} between halves of the data"
    if best_swap.whole < GAIN_THRESHOLD:
        return Verdict(
            None,
            f"routers would move the routing, with little to win: {moved}, {signal}, but the best swaps would gain "
            f"{best_swap.whole:.3g} nats a token even in hindsight",
        )
    return Verdict(
        True,
        f"routers would move the routing, by a signal: {moved}, {signal}, and the best swaps would gain "
        f"{best_swap.whole:.3g} nats a token in hindsight; {MAYBE}",
    )


def _needed(noise_tokens: float, tokens: float) -> str:
    if not math.isfinite(noise_tokens):
        return "how many tokens a step it takes can't be told; look at more batches"
    return f"signal and noise are equal at about {noise_tokens:.2g} tokens a step, of which a batch has {tokens:.0f}"
