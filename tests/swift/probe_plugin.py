"""An external plugin of ms-swift for the tests: the callback ``probe``."""

from __future__ import annotations

from probe import AtTheStart
from swift.callbacks import callbacks_map

callbacks_map["probe"] = lambda args, trainer: AtTheStart(trainer)
