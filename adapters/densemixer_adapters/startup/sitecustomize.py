"""Does what ``densemixer.pth`` does, where `.pth` files don't run: `densemixer run` puts this folder on PYTHONPATH.

Python imports ``sitecustomize`` at its start. The one that this file hides, if any, is run in its place afterwards.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

try:
    from densemixer_adapters import _boot
except ImportError:  # another Python, without this package: it starts as without us
    pass
else:
    _boot.install()

_here = os.path.dirname(os.path.abspath(__file__))
_spec = PathFinder.find_spec(__name__, [path for path in sys.path if os.path.abspath(path) != _here])
if _spec is not None and _spec.loader is not None:
    sys.modules[__name__] = _module = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
