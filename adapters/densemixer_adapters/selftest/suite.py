"""All checks, one after the other; an error in one is its outcome and stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from densemixer_adapters.selftest import gradients, kernels, products, speed, spread
from densemixer_adapters.selftest.outcome import Outcome

CHECKS: dict[str, Callable[[str], Iterator[Outcome]]] = {
    "products": products.check_products,
    "kernel": kernels.check_kernel,
    "gradients": gradients.check_gradients,
    "compile": gradients.check_compile,
    "expert parallelism": spread.check_spread,
    "ways": speed.check_ways,
    "speed": speed.check_speed,
}
"""By name, what matters most first."""


def run(names: Sequence[str] = (*CHECKS,)) -> Iterator[Outcome]:
    """The outcomes, as they come."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names:
        try:
            yield from CHECKS[name](device)
        except Exception as error:  # whatever it is, it belongs into the report
            message = str(error).strip().splitlines()
            yield Outcome(name, "all", "failed", f"{type(error).__name__}: {message[0] if message else ''}")
