"""Test support: makes every process as if the package could be imported but were not installed."""

import sys

from densemixer_adapters import _boot

if _boot.is_live():
    sys.meta_path.remove(_boot._Finder)
