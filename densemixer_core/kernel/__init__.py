"""For GPUs: inner products of experts in other ways than expert by expert.

- ``fused``: for which experts there are such ways.
- ``ways``: the three ways, and how the fastest proves itself on each machine.
- ``trial``: with how many tokens it does.
- ``triton_kernel``: the fused kernel, which writes nothing of what the inner products are made of.
- ``at_once``: the products over many experts at once.
- ``activations``: the formulas that both know, and how a module's is recognised.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernel, on a CPU."""
