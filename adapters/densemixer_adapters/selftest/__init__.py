"""Whether DenseMixer's numbers are right on this machine, and what it costs there. `densemixer selftest` runs it.

- ``reference``: the gradient, dense and in any dtype; float64 is the truth.
- ``gradients``: a layer of transformers against it, for each implementation of its experts; torch.compile.
- ``samples``: random experts, and their inner products in float64.
- ``products``: the core's inner products, exact and by a budget.
- ``kernels``: the other ways to these, on a GPU.
- ``spread``: experts on two processes.
- ``speed``: time and memory of a step.
"""

from densemixer_adapters.selftest.outcome import Outcome
from densemixer_adapters.selftest.suite import CHECKS, run

__all__ = ["CHECKS", "Outcome", "run"]
