from __future__ import annotations

import os
import sys
from pathlib import Path

from installs import is_installed

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Automodel compiles its activations, for minutes each on a CPU
sys.path.append(str(Path(__file__).parents[2] / "examples" / "automodel"))

if not is_installed("nemo-automodel"):
    collect_ignore_glob = ["test_*.py"]
