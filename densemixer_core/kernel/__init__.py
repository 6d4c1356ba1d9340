"""The fused kernel for GPUs: inner products of experts without writing what they are made of.

- ``fused``: when it is used, and how it proves itself on each machine.
- ``triton_kernel``: the kernel.
- ``activations``: the formulas that it knows, and how a module's is recognised.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernel, on a CPU."""
