"""Trains by several YAMLs in one process, one after the other. Usage: many.py FOLDER...

Each folder has a ``my.yaml`` and gets a ``report.json`` and a ``log``. Most of the time goes into imports.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from axolotl.cli.train import do_cli
from axolotl.integrations.base import PluginManager

for folder in map(Path, sys.argv[1:]):
    os.chdir(folder)
    os.environ["PROBE"] = str(folder / "report.json")
    PluginManager.get_instance().plugins.clear()  # of the YAML before
    with open("log", "w") as log, contextlib.redirect_stderr(log):
        do_cli(config="my.yaml")
