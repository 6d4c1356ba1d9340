"""An external plugin of ms-swift for the tests: the callback ``probe``, and the reward ``many_kinds``."""

from __future__ import annotations

from typing import Any

from probe import AtTheStart
from swift.callbacks import callbacks_map
from swift.rewards import ORM, orms

callbacks_map["probe"] = lambda args, trainer: AtTheStart(trainer)


class ManyKinds(ORM):
    """Differs between the completions of a model that has learned nothing."""

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text))) + len(text) / 100 for text in completions]


orms["many_kinds"] = ManyKinds
