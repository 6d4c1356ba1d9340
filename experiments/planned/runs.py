"""Which runs a part of the experiment has: what PLAN.md says, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from common.kept import Kept
from planned.arms import EQUAL_TIME, FROZEN_ROUTER, FROZEN_START
from planned.parts import PARTS
from planned.running import Job, Result
from planned.sizes import Planned
from post_training.arms import BASELINE
from scipy import stats

SEED, TUNING_SEED = 100, 2000  # the first; no run of post-training has them
GATE = 3.0  # standard errors
GATED_BY = (FROZEN_ROUTER, BASELINE)


class Runs:
    """What one part needs, given what is kept.

    Args:
        ratios: For each start model of the part that trains routers alone, how much longer a step of DenseMixer takes.
    """

    def __init__(self, name: str, size: Planned, kept: Kept[Result], ratios: Mapping[str, float]) -> None:
        self.name, self.part = name, PARTS[name]
        self._size, self._kept, self._ratios = size, kept, ratios

    def missing(self) -> list[Job]:
        """The runs that can be done now, of one setting; none if all are done. After them there may be more."""
        for setting in self.part.settings:
            tuning = [job for arm in self.arms() for job in self._grid(setting, arm)]
            if missing := self._kept.missing(tuning):
                return missing
            final = [job for arm in self.arms() for job in self.finals(setting, arm)]
            if missing := self._kept.missing(final):
                return sorted(missing, key=lambda job: job.seed)
        return []

    def finals(self, setting: tuple[str, str], arm: str) -> list[Job]:
        """Those of one arm, in the order of the seeds."""
        seeds = 1 if arm == FROZEN_START else self._size.seeds
        rate = self.rate(setting, arm)
        return [self._job(setting, arm, rate, SEED + seed, "test") for seed in range(seeds)]

    def rate(self, setting: tuple[str, str], arm: str) -> float:
        """The learning rate with the lowest loss on the validation split, or the one that is set beforehand."""
        if arm == FROZEN_START:
            return 0.0
        if self.name == "router-rate":
            return self._size.sft_rate
        losses = self.tuned(setting, arm)
        return min(losses, key=lambda rate: losses[rate])

    def tuned(self, setting: tuple[str, str], arm: str) -> dict[float, float]:
        """The mean loss on the validation split by learning rate, as far as it is known."""
        losses: dict[float, list[float]] = {}
        for job in self._grid(setting, arm):
            if job in self._kept:
                losses.setdefault(job.rate, []).append(self._kept[job].loss)
        return {rate: sum(found) / len(found) for rate, found in sorted(losses.items())}

    def complete(self, setting: tuple[str, str], arm: str) -> bool:
        """Whether an arm has all its runs."""
        return not self._kept.missing(self._grid(setting, arm)) and not self._kept.missing(self.finals(setting, arm))

    def done(self, setting: tuple[str, str]) -> bool:
        """Whether a setting has all its runs. Without them nothing is said of it."""
        return all(self.complete(setting, arm) for arm in self.arms())

    def results(self, setting: tuple[str, str], arm: str) -> list[Result]:
        """The final results of an arm, in the order of the seeds."""
        return [self._kept[job] for job in self.finals(setting, arm)]

    def losses(self, setting: tuple[str, str], arm: str, split: str = "test") -> list[float]:
        """Those of `results`, on a split; what isn't trained has the same for every seed."""
        found = [float(getattr(result, split)) for result in self.results(setting, arm)]
        return found * self._size.seeds if arm == FROZEN_START else found

    @property
    def gated(self) -> bool:
        """Whether the part goes on only if routers matter in it, and that is known."""
        return self.name == "up-cycled" and all(self.complete(self.part.settings[0], arm) for arm in GATED_BY)

    def gate(self) -> float:
        """How many standard errors conventional training is below a frozen random router."""
        frozen, base = (self.losses(self.part.settings[0], arm) for arm in GATED_BY)
        return float(stats.ttest_rel(frozen, base).statistic)

    def passed(self) -> bool:
        """Whether that is enough to go on."""
        return self.gate() >= GATE

    def arms(self) -> Iterable[str]:
        """Those that may be run now."""
        return GATED_BY if self.name == "up-cycled" and not (self.gated and self.passed()) else self.part.arms

    def _grid(self, setting: tuple[str, str], arm: str) -> Iterator[Job]:
        """An arm's tuning runs; the grid grows where all of it is known and the best rate is at its edge."""
        if arm == FROZEN_START or self.name == "router-rate":
            return
        rates = list(self._size.rates if self.name == "router-only" else self._size.up_cycled_rates)
        jobs = self._at(setting, arm, rates)
        for _ in range(self._size.extensions):
            if self._kept.missing(jobs):
                break
            best = min(jobs, key=lambda job: self._mean(setting, arm, job.rate)).rate
            if best == rates[0]:
                rates.insert(0, _round(rates[0] ** 2 / rates[1]))
            elif best == rates[-1]:
                rates.append(_round(rates[-1] ** 2 / rates[-2]))
            jobs = self._at(setting, arm, rates)
        yield from jobs

    def _at(self, setting: tuple[str, str], arm: str, rates: Iterable[float]) -> list[Job]:
        seeds = range(TUNING_SEED, TUNING_SEED + self._size.tuning_seeds)
        return [self._job(setting, arm, rate, seed, "validation") for rate in rates for seed in seeds]

    def _mean(self, setting: tuple[str, str], arm: str, rate: float) -> float:
        jobs = self._at(setting, arm, [rate])
        return sum(self._kept[job].loss for job in jobs) / len(jobs)

    def _job(self, setting: tuple[str, str], arm: str, rate: float, seed: int, split: str) -> Job:
        return Job(self.name, *setting, arm, rate, self._steps(setting[0], arm), seed, split)

    def _steps(self, start: str, arm: str) -> int:
        if self.name == "router-rate":
            return self._size.starts[start].sft_steps
        if self.name == "up-cycled":
            return self._size.up_cycled_steps
        if arm == FROZEN_START:
            return 0
        return round(self._size.steps * (self._ratios[start] if arm == EQUAL_TIME else 1))


def _round(rate: float) -> float:
    """One significant digit."""
    return float(f"{rate:.0e}")
