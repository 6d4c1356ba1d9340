"""An external plugin of ms-swift for the tests: the callback ``probe``, and the reward ``many_kinds``."""

from __future__ import annotations

from typing import Any

from probe import AtTheStart
from swift.callbacks import callbacks_map
from swift.rewards import ORM, orms


class ManyKinds(ORM):
    """By a rule, and never the same for all completions of a prompt: random weights write what no task asks for."""

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text))) + len(text) / 100 for text in completions]


callbacks_map["probe"] = lambda args, trainer: AtTheStart(trainer)
orms["many_kinds"] = ManyKinds
