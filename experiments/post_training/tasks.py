"""What the two tasks of post-training have in common."""

from __future__ import annotations

from typing import Any, Protocol

from batches import Batch
from torch import Tensor


class Task(Protocol):
    """A task with the data of one seed: the same for every arm, whatever it makes of the model.

    Attributes:
        steps: Optimizer steps of a run.
        probe: Held-out text on which routing is compared before and after.
    """

    steps: int
    probe: Batch

    def loss(self, model: Any, step: int) -> Tensor:
        """The loss of a step's batch, to be minimised."""

    def evaluate(self, model: Any, split: str) -> float:
        """The metric on a held-out split."""
