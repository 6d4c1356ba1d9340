"""What a fine-tuning run gives back. Apart from the code that needs torch, which takes seconds to import."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

MEMORY_STEPS = 3  # taken before peak memory is read


class Measurement(NamedTuple):
    """A model at one moment. The two router gradients are taken at the same weights and on the same batch.

    Attributes:
        step: Optimizer steps taken so far.
        held_out_loss: Mean cross-entropy per completion token, in nats.
        gradient_conventional: Norm of the gradient of all router weights if only selected experts teach them.
        gradient_densemixer: Its norm with DenseMixer.
        share_unselected: ‖added‖ / (‖added‖ + ‖conventional‖), where the two sum to the gradient with DenseMixer.
        routing_change: The share of the expert selections at the start that aren't made any more.
    """

    step: int
    held_out_loss: float
    gradient_conventional: float
    gradient_densemixer: float
    share_unselected: float
    routing_change: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What one arm gave.

    Attributes:
        arm: What it is called in everything that a reader sees.
        train_loss: Nats per completion token, of each step's batch.
        step_seconds: Duration of each step: forward, backward and optimizer.
        measurements: From before the first step to after the last.
        peak_mib: Highest memory use of a process that trains this arm and does nothing else, MiB.
        examples: Number of different training examples used.
        held_out_examples: Number of held-out examples measured on.
        device: ``"cpu"`` or ``"cuda"``.
        hardware: The device in words.
    """

    arm: str
    train_loss: list[float]
    step_seconds: list[float]
    measurements: list[Measurement]
    peak_mib: float
    examples: int
    held_out_examples: int
    device: str
    hardware: str
