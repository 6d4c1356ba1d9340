"""Prints what DenseMixer does with each architecture of the installed transformers, as it stands in docs/models.md.

Run it as ``python tests/transformers/table.py`` with transformers and this package installed.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import architectures
import sweep
import transformers

from densemixer_adapters.transformers.routers import Router

HEADER = "| Router's score | Weights | Architectures |\n|---|---|---|"


def counts(outcomes: dict[str, list[Router] | str]) -> str:
    refused = sum(isinstance(outcome, str) for outcome in outcomes.values())
    version, supported, total = transformers.__version__, len(outcomes) - refused, len(outcomes)
    return f"transformers {version}: {supported} supported, {refused} refused with a reason, {total} in all"


def table(outcomes: dict[str, list[Router] | str]) -> str:
    """One row for each kind of router, and one for each reason to refuse."""
    rows = defaultdict(set)
    for folder, outcome in outcomes.items():
        if isinstance(outcome, str):
            reason = re.search(r"can't train it: (.*?)\. Switch", outcome)
            rows["refused", reason[1] if reason else outcome].add(folder)
        else:
            for router in outcome:
                rows[router.score, _weights(router)].add(folder)
    lines = [f"| {' | '.join(key)} | {', '.join(sorted(folders))} |" for key, folders in rows.items()]
    order = sorted(lines, key=lambda line: (line.startswith("| refused"), line))
    return "\n".join([HEADER, *order])


def _weights(router: Router) -> str:
    if isinstance(router.renormalised, str):
        text = f"as configured (`{router.renormalised}`)"
    else:
        text = "renormalised" if router.renormalised else "not renormalised"
    if router.expert_scale:
        text += ", times a scale of each expert"
    further = {None: "", "identity": "; some experts return their input", "zero": "; one expert returns zero"}
    return text + further[router.further]


def outcomes() -> dict[str, list[Router] | str]:
    return {folder: sweep.outcome(folder) for folder in architectures.found()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    found = outcomes()
    print(counts(found), table(found), sep="\n\n")
