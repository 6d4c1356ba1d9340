"""Runs Liger's kernels on the CPU, in Triton's interpreter.

Usage: TRITON_INTERPRET=1 LIGER_FUSED_MOE_AUTOTUNE=0 liger.py REPORT [CELL]....

Its RMSNorm asks for what the interpreter doesn't have, so it is left out. Our own fused kernel computes there too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe
from runs import loss_of
from setting import FAMILIES, SHALLOW, Result, batch, build, chosen, compare, gradients_of, run, truth

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core.kernel import fused


def patched(before: bool = False) -> Result:
    """Liger is applied to the model, or to the classes of which it is made; one layer, for the interpreter is slow."""
    options = dict(rope=True, fused_linear_cross_entropy=True, rms_norm=False, swiglu=True)
    if before:
        apply_liger_kernel_to_qwen3_moe(**options)
    model = build(FAMILIES[SHALLOW])
    if not before:
        apply_liger_kernel_to_qwen3_moe(**options, model=model)
    apply_densemixer(model)
    loss_of(model, batch()).backward()
    return compare(gradients_of(model), SHALLOW, fused=list(fused._chosen.values()))


def cells() -> Iterator[tuple[str, Callable[[], Result]]]:
    # From transformers' own code: what Liger replaces stays replaced.
    truth("densemixer", SHALLOW), truth("conventional", SHALLOW)
    yield "Liger: all but RMSNorm", patched
    yield "Liger: applied before the model is made", lambda: patched(before=True)


if __name__ == "__main__":
    run(chosen(cells(), sys.argv[2:]), Path(sys.argv[1]))
