"""Finished runs in a file, so that an experiment that was interrupted goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rich.progress import Progress


class Finished(Protocol):
    """A dataclass that knows what was run."""

    @property
    def job(self) -> Hashable: ...


Result = TypeVar("Result", bound=Finished)


class Kept(Generic[Result]):
    """A file that gets a line for each run as soon as it has finished.

    Its first line says what all runs have in common. A last line that wasn't written to its end doesn't count.

    Args:
        path: The file; it is made with the first run.
        common: What all runs have in common, as JSON has it.
        parse: Makes a result of the mapping that JSON makes of it.

    Raises:
        ValueError: The file is of runs that have something else in common.
    """

    def __init__(self, path: Path, common: Mapping[str, Any], parse: Callable[[dict[str, Any]], Result]) -> None:
        self._path = path
        self._common = json.dumps(common)
        self._results: dict[Hashable, Result] = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        if rest:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        lines = whole.splitlines()
        if lines and lines[0] != self._common:
            raise ValueError(f"{path} has runs of another size: remove it, or choose another folder with --output")
        for line in lines[1:]:
            result = parse(json.loads(line))
            self._results[result.job] = result

    def __contains__(self, job: Hashable) -> bool:
        return job in self._results

    def __getitem__(self, job: Hashable) -> Result:
        return self._results[job]

    @property
    def jobs(self) -> Iterable[Hashable]:
        """Those that have been run."""
        return self._results

    def add(self, result: Result) -> None:
        """Keep it, in memory and on disk."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(self._common + "\n")
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")  # type: ignore[call-overload]
        self._results[result.job] = result

    def missing(self, jobs: Iterable[Hashable]) -> list[Any]:
        """Those that haven't been run."""
        return [job for job in jobs if job not in self]


def finish(
    jobs: Sequence[Any],
    kept: Kept[Result],
    pool: Executor,
    work: Callable[..., Result],
    arguments: Sequence[Any],
    progress: Progress,
    description: str,
) -> list[Result]:
    """The results of all jobs, after running ``work(job, *arguments)`` in the pool for those that aren't kept yet."""
    futures = [pool.submit(work, job, *arguments) for job in kept.missing(jobs)]
    for future in progress.track(as_completed(futures), len(futures), description=description):
        kept.add(future.result())
    return [kept[job] for job in jobs]
