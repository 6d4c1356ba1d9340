"""Runs on a GPU what means something there, in parts with a time limit each: tests, and benchmarks at full size.

    python ci/gpu.py [--parts NAME ...] [--dry-run] [--output FOLDER]

Nothing is installed: it runs with the Python at hand, which needs torch, Triton and transformers; a part that needs
more says so. Each part's output goes to a file in the folder of results, each number to a CSV there. The exit status is
1 if a part failed, was ended at its limit, or was cut short by SIGINT, SIGTERM or SIGHUP. `ci/gpu_parts.py` has the
parts, docs/gpu.md more words.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
from gpu_parts import PARTS, Part
from gpu_processes import Interruption, adopt_orphans, children, end_all_but

ROOT = Path(__file__).parents[1].resolve()
CUT = "cut short"
FAILED = ("failed", "ended", CUT)
interruption = Interruption()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Args:
        part: Its name.
        state: ``ok``, ``failed``, ``ended`` at its limit, ``cut short`` by a signal, or ``skipped``.
        seconds: That it took.
        found: The last line that it printed, or why it was skipped or ended.
    """

    part: str
    state: str
    seconds: float
    found: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU, kernels in Triton's interpreter")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu")
    options = parser.parse_args()
    adopt_orphans()
    interruption.listen()
    machine = "CPU, dry run" if options.dry_run else gpu()
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    print(f"{machine}; results in {output}", flush=True)
    outcomes: list[Outcome] = []
    try:
        for part in (part for part in PARTS if part.name in options.parts):
            print(f"{part.name}: {part.why} (at most {part.limit} s)", flush=True)
            outcomes.append(run(part, output, options.dry_run))
            append(outcomes[-1], machine, output / "parts.csv")
            if interruption.name:
                break
    finally:
        print(table(outcomes))
    sys.exit(bool(interruption.name) or any(outcome.state in FAILED for outcome in outcomes))


def gpu() -> str:
    """Its name. In a process of its own, so that this one takes no memory there."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ci/gpu.py needs torch in {sys.executable}: {last(done.stderr, done.returncode)}")
    if not (name := done.stdout.strip()):
        sys.exit(
            "ci/gpu.py needs a CUDA GPU: torch.cuda.is_available() is False. --dry-run tries the parts on the CPU.\n"
            + done.stderr.strip()  # such as that the driver is too old
        )
    return name


def run(part: Part, output: Path, dry: bool) -> Outcome:
    """Run one part, and end all that is left of it afterwards, at its limit, or at a signal."""
    command = part.dry if dry else part.command
    if command is None:
        return Outcome(part.name, "skipped", 0.0, "on a CPU it is in `make test`")
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return Outcome(part.name, "skipped", 0.0, f"needs {', '.join(missing)}")
    log = output / f"{part.name}.log"
    command = [sys.executable, *(argument.replace("OUT", str(output)) for argument in command)]
    start = time.monotonic()
    before = children()
    try:
        with interruption.awaited():
            state, found = finish(command, environment(dry, part.kernels), log, part.limit)
    except KeyboardInterrupt:
        state, found = CUT, f"by {interruption.name}, see {log.name}"
    finally:
        end_all_but(before)
    return Outcome(part.name, state, time.monotonic() - start, found)


def finish(command: list[str], env: dict[str, str], log: Path, limit: int) -> tuple[str, str]:
    """Run a command to its end or its limit: what became of it, and the last line that it printed, or why not."""
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "ended", f"took more than {limit} s, see {log.name}"
    text = log.read_text(errors="replace")
    return ("failed", last(text, status)) if status else ("ok", last(text, status))


def last(text: str, status: int) -> str:
    """The last line of an output; without one, or where a signal ended the process, its exit status."""
    *_, line = ["", *text.strip().splitlines()]
    line = line.strip("= ")
    return line if line and status >= 0 else ", ".join(filter(None, [f"exit status {status}", line]))


def environment(dry: bool, kernels: bool) -> dict[str, str]:
    paths = [ROOT, ROOT / "adapters", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    where = {"TRITON_INTERPRET": str(int(kernels)), "CUDA_VISIBLE_DEVICES": ""} if dry else {"TEST_DEVICE": "cuda"}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "PYTHONUNBUFFERED": "1",  # what is ended keeps what it has printed
        **where,
    }


def append(outcome: Outcome, machine: str, path: Path) -> None:
    row = {"time": datetime.datetime.now().isoformat(timespec="seconds"), "machine": machine}
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow([*row, *(field.name for field in dataclasses.fields(Outcome))])
        writer.writerow([*row.values(), *dataclasses.astuple(outcome)])


def table(outcomes: Sequence[Outcome]) -> str:
    """A line each."""
    width = max((len(outcome.part) for outcome in outcomes), default=0)
    return "\n".join(
        f"{outcome.state:9} {outcome.part:{width}} {outcome.seconds:6.0f} s  {outcome.found}" for outcome in outcomes
    )


if __name__ == "__main__":
    main()
