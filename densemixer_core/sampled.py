"""⟨g, E_j(x)⟩ of a part of the pairs of a token and an expert, and an estimate of the others, right on average."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from densemixer_core.config import DenseMixerConfig
from densemixer_core.control import Known, Pilot, fit
from densemixer_core.experts import expert_dots
from densemixer_core.products import Matrix, Rows, oriented, room_for_dots, temporary_bytes
from densemixer_core.sampling import Pairs, draw_pairs, offsets, share_of_pairs, typical_size
from densemixer_core.weights import StackedExperts

PAIRS_PER_PILOT = 10
"""Of so many pairs one is spent on the pilot."""


def stacked_dots(
    x: Tensor,
    g: Tensor,
    known: Known | None,
    *,
    experts: StackedExperts,
    selected: int,
    dtype: torch.dtype,
    config: DenseMixerConfig,
) -> Tensor:
    """What a `densemixer_core.ExpertDots` returns, of experts that are all here.

    Args:
        x: As in `expert_dots`, and so are ``g``, ``experts`` and ``dtype``.
        known: What is known of the pairs, for a budget below 1.
        selected: How many experts a token goes through.
        config: The options.

    Returns:
        [tokens, experts], float32 or float64.
    """
    bound = config.workspace_mb << 20
    if known is None:
        return expert_dots(x, g, experts, dtype, bound)
    count = share_of_pairs(len(x), len(experts.weights.down), known.sensitivity.shape[-1], selected, config.budget)
    return sampled_dots(x, g, known, count, config.seed, experts, dtype, bound)


def sampled_dots(
    x: Tensor,
    g: Tensor,
    known: Known,
    count: int,
    seed: int,
    experts: StackedExperts,
    dtype: torch.dtype | None = None,
    workspace_bytes: int = 1 << 28,
) -> Tensor:
    """An estimate of ⟨g_t, E_j(x_t)⟩ for every token t and expert j that evaluates ``count`` of the pairs.

    The rows of a pair are gathered, and all pairs go through one grouped matrix product for each projection. A few of
    the pairs are a pilot: they tell how large the inner products of each expert are, and how much of them is known
    beforehand, see `control`. Their own inner products are exact then, so the others are drawn from the rest. Experts
    without weights cost nothing, so all their pairs are exact, on top of ``count``.

    Args:
        x: As in `expert_dots`, and so are ``g``, ``experts`` and ``dtype``.
        known: What is known of the pairs.
        count: How many pairs are evaluated.
        seed: Chooses the draws, see `sampling.offsets`.
        workspace_bytes: Upper bound on the temporaries; the pairs are split to stay below it. A copy of the weights in
            another dtype comes on top, and some 40 bytes for each pair of a token and an expert while they are drawn.

    Returns:
        [tokens, experts], float32 or float64; on average over draws `expert_dots`, where the sensitivity isn't zero.
    """
    dtype = dtype or experts.weights.up.dtype
    x, g = x.to(dtype).contiguous(), g.to(dtype).contiguous()
    stacked = len(experts.weights.down)
    dots = room_for_dots(x, g, stacked, experts.layout)
    if count == 0:
        return dots.t()
    evaluator = _Evaluator(x, g, experts, dots.dtype, workspace_bytes)
    norm = evaluator.gradient_norms()
    importance = _importance(known.sensitivity[:, :stacked], norm)
    # Of what doesn't depend on the pilot: on a GPU its sums differ in their rounding from run to run.
    offset, next_offset = offsets(importance, seed)
    along = known.along.squeeze(1).to(dots.dtype)
    if pilots := count // PAIRS_PER_PILOT:
        pilot = evaluator.pilot(draw_pairs(importance / importance.sum(0).clamp(min=1e-30), pilots, offset))
        dots[:stacked], rest = fit(pilot, g, norm, along, known.prior)
        dots.view(-1)[pilot.pairs.place] = pilot.dots
        importance = importance * typical_size(rest, pilot.pairs, len(x))
        importance.t().view(-1).index_fill_(0, pilot.pairs.place, 0.0)
    else:
        # Pairs of an expert whose scale is zero are never drawn: what is known of them must be exact.
        dots[:stacked] = known.prior * along * (evaluator.scale != 0).unsqueeze(1)
        importance = importance * evaluator.scale.abs().to(importance.dtype)
    pairs = draw_pairs(importance, count - pilots, next_offset)
    rest = (evaluator.dots(pairs) - dots.view(-1)[pairs.place]) * pairs.factor.to(dots.dtype)
    dots.view(-1).index_add_(0, pairs.place, torch.where(pairs.factor > 0, rest, 0))
    return dots.t()


def _importance(sensitivity: Tensor, norm: Tensor) -> Tensor:
    """[tokens, experts], expert by expert in memory, as pairs are drawn. ``norm`` is that of g, [tokens]."""
    # A token without numbers must not take the draw from the others.
    by_expert = sensitivity.t().contiguous() * norm
    return by_expert.nan_to_num(0.0, 0.0, 0.0).t()


class _Evaluator:
    """Evaluates the experts for pairs, as many at a time as fit.

    Args:
        x: The experts' input, in the dtype of the matrix products, [tokens, hidden]; so is ``g``.
        accumulate: The dtype of the inner products.
    """

    def __init__(
        self, x: Tensor, g: Tensor, experts: StackedExperts, accumulate: torch.dtype, workspace_bytes: int
    ) -> None:
        self._x, self._g, self._layout = x, g, experts.layout
        up, down, *biases, scale, gate = oriented(experts)
        self._up: Matrix = up.to(x.dtype) if gate is None else (gate.to(x.dtype), up.to(x.dtype))
        self._down = down.to(x.dtype)
        self._biases = [None if bias is None else bias.to(x.dtype) for bias in biases]
        self.scale = down.new_ones(len(down), dtype=accumulate) if scale is None else scale.to(accumulate)
        row = temporary_bytes(oriented(experts), x.dtype) + 2 * x.shape[1] * x.element_size()
        self._rows = max(1, workspace_bytes // row)

    def gradient_norms(self) -> Tensor:
        """‖g‖ of each token. In float64: squares leave the range of float32 where what they are of doesn't."""
        parts = torch.split(self._g, self._rows)
        norms = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in parts]
        return torch.cat(norms).to(self.scale.dtype)

    def dots(self, pairs: Pairs) -> Tensor:
        """⟨g, E_j(x)⟩ of each pair, [pairs]."""
        return torch.cat([rows.dots(x, g) * self.scale[expert] for rows, expert, x, g in self._split(pairs)])

    def pilot(self, pairs: Pairs) -> Pilot:
        """The same, with the sums of the outputs."""
        sums, parts = self.scale.new_zeros(len(self.scale), self._x.shape[1]), []
        for rows, expert, x, g in self._split(pairs):
            outputs = rows.outputs(x)
            parts.append(torch.sum(outputs * g, -1, dtype=sums.dtype) * self.scale[expert])
            sums.index_add_(0, expert, outputs.to(sums.dtype))
        return Pilot(pairs, torch.cat(parts), sums * self.scale.unsqueeze(1))

    def _split(self, pairs: Pairs) -> Iterator[tuple[Rows, Tensor, Tensor, Tensor]]:
        """For a part of the pairs each time: the experts, the number of each row's expert, and its x and g."""
        # Of the rows one copy, written to again for each part: new memory costs a CPU more than the copy.
        room = [rows.new_empty(min(self._rows, len(pairs.place)), rows.shape[1]) for rows in (self._x, self._g)]
        start = 0
        for place in torch.split(pairs.place, self._rows):
            expert, token = place // len(self._x), place % len(self._x)
            up_bias, down_bias = (None if bias is None else bias.index_select(0, expert) for bias in self._biases)
            grouped = functools.partial(_grouped_affine, (pairs.ends - start).clamp(0, len(place)))
            rows = Rows(self._up, self._down, up_bias, down_bias, self._layout, grouped)
            x, g = (copy[: len(place)] for copy in room)
            torch.index_select(self._x, 0, token, out=x)
            torch.index_select(self._g, 0, token, out=g)
            yield rows, expert, x, g
            start += len(place)


def _grouped_affine(ends: Tensor, x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """Each row by the matrix of its expert; the rows of expert j, and of ``bias``, come before ``ends[j]``."""
    product = _opaque_grouped_product if torch.compiler.is_compiling() else _grouped_product
    if isinstance(weight, Tensor):
        output = product(x, weight, ends)
    else:
        output = torch.cat([product(x, half, ends) for half in weight], -1)
    return output if bias is None else output + bias


def _is_taken(tensor: Tensor) -> bool:
    """Whether torch's grouped product takes it: weights may be views of something else."""
    *_, rows, columns = tensor.shape
    *_, row, column = tensor.stride()
    lies = (column == 1 and row >= columns) or (row == 1 and column >= rows)
    steps = [*tensor.shape[1:], *(stride for stride in tensor.stride() if stride != 1)]
    return lies and tensor.data_ptr() % 16 == 0 and all(step * tensor.element_size() % 16 == 0 for step in steps)


def _grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _is_taken(x) and _is_taken(weight) and x.dtype != torch.float64 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight, offs=ends)
    groups = torch.split(x, ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight, strict=True)])


# torch.compile takes torch's grouped product in bfloat16 only.
_opaque_grouped_product = torch.library.custom_op("densemixer::grouped_product", _grouped_product, mutates_args=())


@_opaque_grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])
