"""Trains several times in one process, one after the other. Usage: many.py FOLDER...

Each folder has a ``command.json`` and gets a ``report.json`` and a ``log``. Most of the time goes into imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from swift.pipelines import rlhf_main, sft_main

PROGRAMS = {"sft": sft_main, "rlhf": rlhf_main}

for folder in map(Path, sys.argv[1:]):
    os.chdir(folder)
    os.environ["PROBE"] = str(folder / "report.json")
    program, *options = json.loads(Path("command.json").read_text())
    with open("log", "w") as log, contextlib.redirect_stderr(log):
        PROGRAMS[program](options)
