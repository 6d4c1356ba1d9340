"""Takes one setting's training steps, in a process of its own, one whenever it is told to.

    python worker.py SPECIFICATION

The specification is the JSON of `Specification`. For each line on standard input, a step is taken and its seconds are
printed; at the end of the input, a line of JSON says what was measured besides. Runs with transformers 5 and with the
transformers 4 of the original densemixer.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH=1 leaves it out
from shapes import Shape


@dataclasses.dataclass(frozen=True)
class Specification:
    """What a worker does.

    Args:
        setting: ``conventional``, ``original``, ``matmul``, or the budget of DenseMixer.
        shape: The dimensions.
        tokens: Tokens of a step, in one sequence.
        layers: Layers of a whole model, or 0 for a Mixture-of-Experts block alone.
        checkpointing: Whether the model checkpoints its activations.
        experts: The `experts_implementation` of transformers 5.
        dtype: Name of a dtype of torch.
        device: Name of a device of torch.
    """

    setting: str
    shape: Shape
    tokens: int
    layers: int
    checkpointing: bool
    experts: str
    dtype: str
    device: str


def main() -> None:
    fields = json.loads(sys.argv[1])
    specification = Specification(**{**fields, "shape": Shape(**fields["shape"])})
    answers, sys.stdout = sys.stdout, sys.stderr  # the original logs to its standard output
    if specification.setting == "original":
        import densemixer  # noqa: F401  # patches transformers; DENSEMIXER_ENABLED is set
    import torch

    def clock() -> float:
        if specification.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    step = make_step(specification)
    before = memory(specification.device)
    step()
    for _ in sys.stdin:
        start = clock()
        step()
        print(clock() - start, file=answers, flush=True)
    import transformers

    peak = memory(specification.device) - before
    saved = 0 if specification.setting == "matmul" else saved_bytes(step)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"peak": peak, "saved": saved, "versions": versions}), file=answers, flush=True)


def make_step(specification: Specification) -> Callable[[], Any]:
    """Forward and backward of the setting."""
    import torch

    shape, tokens = specification.shape, specification.tokens
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": getattr(torch, specification.dtype), "device": specification.device}
    if specification.setting == "matmul":
        x = torch.randn(tokens, shape.hidden, **options)
        weight = torch.randn(2 * shape.ffn, shape.hidden, **options)
        return lambda: [x @ weight.t() for _ in range(8)]

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(shape.shallow(specification.layers or 1).model_config(tokens))
    model = model.to(**options).train()
    if specification.setting != "original":
        model.set_experts_implementation(specification.experts)
    module = model if specification.layers else model.model.layers[0].mlp
    if specification.setting not in ("conventional", "original"):
        from densemixer_adapters.transformers import apply_densemixer
        from densemixer_core import DenseMixerConfig

        apply_densemixer(module, DenseMixerConfig(budget=float(specification.setting)))
    if specification.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if specification.layers:
        ids = torch.randint(model.config.vocab_size, (1, tokens), device=specification.device)

        def train_model() -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return train_model

    x = torch.randn(1, tokens, shape.hidden, **options).requires_grad_()
    g = torch.randn(1, tokens, shape.hidden, **options)

    def train_block() -> None:
        module.zero_grad()
        x.grad = None
        output = module(x)
        (output[0] if isinstance(output, tuple) else output).backward(g)

    return train_block


def memory(device: str) -> int:
    """The most bytes in use so far."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def saved_bytes(step: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd saves in one step, each counted once, with those of the parameters."""
    import torch

    storages = {}

    def pack(tensor: Any) -> Any:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


if __name__ == "__main__":
    main()
