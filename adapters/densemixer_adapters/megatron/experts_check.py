"""Whether a layer's experts compute what their weights say; when, is said in `densemixer_adapters.transformers.checks`.

One token of each expert of this rank is compared, between the place where the token dispatcher hands tokens to the
experts and the place where it takes their outputs. There each rank has its own experts, or its part of them, and what
these return: no rank waits for another.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from densemixer_adapters.megatron.experts import read_experts
from densemixer_adapters.megatron.host_layer import HostLayer
from densemixer_adapters.megatron.overrides import Overrides
from densemixer_adapters.transformers.checks import OutputMismatchError, Recurring, check_output, comparable, signature
from densemixer_core import StackedExperts, compute_dtype, routed_output

OVERRIDDEN = ("dispatch_postprocess", "combine_preprocess")
"""What is overridden on the token dispatcher: it hands out, and it takes back."""


@dataclasses.dataclass(frozen=True)
class _Sample:
    """One token of each expert of this rank that has any.

    Attributes:
        rows: Where they are among all that the experts get.
        experts: Which of this rank's experts each goes through, in ascending order.
        x: They, [tokens, hidden]; a copy, since somebody may write to what the experts get.
        weights: Their weights, [tokens, 1].
    """

    rows: Tensor
    experts: list[int]
    x: Tensor
    weights: Tensor


class ExpertsCheck:
    """The comparison of one layer's experts with their weights, and when it is due.

    Args:
        layer: Whose experts.
    """

    def __init__(self, layer: HostLayer) -> None:
        self._layer = layer
        self._overrides = Overrides(dict.fromkeys(OVERRIDDEN, layer.block.token_dispatcher))
        self._seen: tuple[Any, ...] = ()
        self._compared: tuple[Any, ...] | None = None
        self._recurring = Recurring()
        self._due = False
        self._sample: _Sample | None = None

    def attach(self) -> None:
        self._overrides.put({name: getattr(self, f"_{name}") for name in OVERRIDDEN})

    def remove(self) -> None:
        """Does nothing the second time."""
        self._overrides.undo()
        self.forget()

    def begin(self) -> None:
        """Tokens will be handed out whose router is trained through all experts."""
        self._seen = signature(*_visible(self._layer.block.experts))
        due = self._recurring.due()
        self._due = due or self._seen != self._compared

    def forget(self) -> None:
        self._due, self._sample = False, None

    def _dispatch_postprocess(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        handed_out: tuple[Tensor, Tensor, Tensor] = self._overrides.host("dispatch_postprocess")(*args, **kwargs)
        if self._due:
            # Out of sight of who records operations, as selective checkpointing, whose recomputation comes without.
            with torch.no_grad(), _disable_current_modes():
                self._sample = _sample(*handed_out)
        return handed_out

    def _combine_preprocess(self, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        sample = self._sample
        self.forget()
        if sample is not None:
            with torch.no_grad(), _disable_current_modes():
                if self._compare(sample, output[sample.rows]):
                    self._compared = self._seen
                    self._recurring.made()
        return self._overrides.host("combine_preprocess")(output, *args, **kwargs)

    def _compare(self, sample: _Sample, output: Tensor) -> bool:
        """Whether the experts return what their weights give; False where that can't be compared.

        Raises:
            OutputMismatchError: The message names the layer, the reason and the fix.
            UnsupportedModelError: The weights can't be read any more.
        """
        block, name = self._layer.block, self._layer.name
        experts = read_experts(block, name)
        if not comparable(block, block.experts):
            return False

        def evaluate(x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            return _routed_output(x, index, weights, experts, sample.experts)

        index = torch.tensor(sample.experts, device=output.device).unsqueeze(1)
        dtype = compute_dtype(experts[0].weights.up)
        try:
            check_output(output, sample.x, index, sample.weights, evaluate, dtype, tokens=len(index))
        except OutputMismatchError as error:
            raise OutputMismatchError(
                f"{name}, experts ({type(block.experts).__name__}): {error}. Something changes what they return: a "
                "replaced or wrapped forward, a hook, an adapter, or an activation that isn't that of the layer's "
                "configuration. DenseMixer computes with the experts' weights, so the router's gradient would be "
                "wrong. Undo that, or switch DenseMixer off."
            ) from None
        return True


def _visible(experts: nn.Module) -> list[nn.Module]:
    """Those modules whose hooks and forwards are looked at in each forward. There may be hundreds of experts, which
    are seldom changed one by one: of separate ones, the first."""
    separate = getattr(experts, "local_experts", None)
    return [experts, *(experts if separate is None else separate[0]).modules()]


def _sample(x: Tensor, counts: Tensor, weights: Tensor) -> _Sample | None:
    """The token in the middle of each expert's; None if there are none.

    Args:
        x: What the experts get, [tokens, hidden], expert by expert.
        counts: How many tokens each of them gets.
        weights: Those of the tokens.
    """
    numbers = torch.as_tensor(counts).tolist()
    ends = list(itertools.accumulate(numbers))
    experts = [expert for expert, count in enumerate(numbers) if count]
    if not experts:
        return None
    rows = torch.tensor([ends[expert] - (numbers[expert] + 1) // 2 for expert in experts], device=x.device)
    return _Sample(rows, experts, x[rows], weights.flatten()[rows].unsqueeze(1))


def _routed_output(
    x: Tensor, index: Tensor, weights: Tensor, experts: Sequence[StackedExperts], numbers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`densemixer_core.routed_output` of tokens that each go through one expert, in the order of the experts.

    Args:
        x, index, weights: As there.
        experts: Those of this rank, together or one by one.
        numbers: What ``index`` has, without waiting for the device.
    """
    parts, first = [], 0
    for some in experts:
        after = first + len(some.weights.down)
        rows = slice(bisect.bisect_left(numbers, first), bisect.bisect_left(numbers, after))
        if rows.start < rows.stop:
            parts.append(routed_output(x[rows], index[rows] - first, weights[rows], some))
        first = after
    outputs, sizes = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(sizes)
