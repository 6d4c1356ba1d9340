"""How large the runs of the experiment are that was decided beforehand; see PLAN.md."""

from __future__ import annotations

import dataclasses

from common.sizes import SIZES, Size


@dataclasses.dataclass(frozen=True)
class Planned:
    """One size of it. Lengths are in tokens.

    Attributes:
        starts: The start models by name. The one with a single expert is dense: it is up-cycled.
        window: Length of a sequence.
        rows: Sequences of a step.
        steps: Steps of a run that trains routers alone; "equal time" has more.
        validation, test: Held-out sequences of each text.
        texts: Of each kind of text, at most.
        rates: The learning rates of routers alone that are tried for every arm, rising.
        extensions: How often the grid grows where the best rate is at its edge.
        tuning_seeds: Runs for each of them.
        seeds: Runs of each arm afterwards.
        sft_rate: The learning rate of all weights in the SFT task; routers have it times 1 or 10.
        up_cycled_steps, up_cycled_rates: Of the up-cycled model, all of whose weights are trained.
        timed_steps: Steps of each arm whose time is measured.
    """

    starts: dict[str, Size]
    window: int
    rows: int
    steps: int
    validation: int
    test: int
    texts: int
    rates: tuple[float, ...]
    extensions: int
    tuning_seeds: int
    seeds: int
    sft_rate: float
    up_cycled_steps: int
    up_cycled_rates: tuple[float, ...]
    timed_steps: int


def _starts(size: Size) -> dict[str, Size]:
    """The small start model; one of as many weights in twice as many experts, of which twice as many are selected."""
    return {
        "16 experts": size,
        "32 experts": dataclasses.replace(size, experts=2 * size.experts, top_k=2 * size.top_k, ffn=size.ffn // 2),
        "dense": dataclasses.replace(size, experts=1, top_k=1),
    }


SMALL = Planned(
    starts=_starts(SIZES["small"]),
    window=128,
    rows=16,
    steps=40,
    validation=64,
    test=128,
    texts=2000,
    rates=(3e-3, 1e-2, 3e-2),
    extensions=2,
    tuning_seeds=1,
    seeds=8,
    sft_rate=3e-4,
    up_cycled_steps=60,
    up_cycled_rates=(3e-4, 1e-3, 3e-3),
    timed_steps=10,
)

PLANNED = {
    "tiny": dataclasses.replace(  # for the tests
        SMALL,
        starts=_starts(SIZES["tiny"]),
        window=32,
        rows=2,
        steps=2,
        validation=2,
        test=2,
        texts=40,
        rates=(1e-3, 1e-2),
        extensions=1,
        seeds=2,
        up_cycled_steps=2,
        up_cycled_rates=(1e-3, 1e-2),
        timed_steps=1,
    ),
    "small": SMALL,
}
