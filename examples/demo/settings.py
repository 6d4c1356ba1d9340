"""What one run of the demo is asked to do."""

from __future__ import annotations

import dataclasses


class DemoError(Exception):
    """Something that the user can mend. The message is shown without a traceback."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options; ``--help`` describes them.

    Attributes:
        model: Checkpoint to fine-tune, a folder or a hub id.
        pretrain_steps: 0 if the checkpoint exists; otherwise it is made there.
        max_length: Tokens per example or window.
        device: ``"cpu"`` or ``"cuda"``; ``"auto"`` until a process looks.
    """

    model: str
    estimator: str
    steps: int
    pretrain_steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    seed: int
    device: str
