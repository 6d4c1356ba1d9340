"""A Mixture-of-Experts layer of our own in every layout of the contract, and what the oracle needs to know about it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import oracle
import torch
from torch import Tensor
from torch.nn import functional as F

from densemixer_core import (
    DenseMixerConfig,
    ExpertLayout,
    ExpertWeights,
    StackedExperts,
    router_scores,
    straight_through,
)


def concatenated(up: Tensor) -> Tensor:
    gate, up = up.chunk(2, -1)
    return F.silu(gate) * up


def interleaved(up: Tensor) -> Tensor:
    return F.gelu(up[..., ::2]) * (up[..., 1::2] + 1)


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def clamped(up: Tensor) -> Tensor:
    """gpt-oss, with a limit that tiny layers reach."""
    gate, up = up[..., ::2].clamp(max=2.0), up[..., 1::2].clamp(-2.0, 2.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "concatenated": concatenated,
    "interleaved": interleaved,
    "clamped": clamped,
    "ungated": F.relu,
    "ungated, squared": lambda up: F.relu(up) ** 2,
    "ungated, tanh": lambda up: F.gelu(up, approximate="tanh"),
}

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z: (1 + z.exp()).log().sqrt(),
}


@dataclasses.dataclass
class Case:
    tokens: int = 12
    hidden: int = 10
    ffn: int = 6
    experts: int = 7
    k: int = 3
    activation: str = "concatenated"
    bias: bool = False
    transposed: bool = False
    apart: bool = False  # gate and up projection, where they are concatenated
    post_norm: bool = False
    scale: bool = False
    identities: int = 0
    zeros: int = 0
    score: str = "softmax"
    renormalised: bool = True
    scaling: float = 1.0
    seed: int = 0

    @property
    def scored(self) -> int:
        """How many experts the router scores."""
        return self.experts + self.identities + self.zeros


class Layer:
    """Tensors of a case. ``router``, ``weights`` and ``x`` are leaves; ``g`` is the gradient of the output."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        width = case.ffn if case.activation.startswith("ungated") else 2 * case.ffn
        up, down = (width, case.hidden), (case.hidden, case.ffn)
        apart = case.apart and case.activation == "concatenated"
        if apart:
            up = (case.ffn, case.hidden)
        self.x, self.router = leaf(case.tokens, case.hidden), leaf(case.scored, case.hidden)
        self.weights = ExpertWeights(
            leaf(case.experts, *(reversed(up) if case.transposed else up)),
            leaf(case.experts, *(reversed(down) if case.transposed else down)),
            leaf(case.experts, width) if case.bias else None,
            leaf(case.experts, case.hidden) if case.bias else None,
            leaf(case.experts) if case.scale else None,
            leaf(case.experts, *(reversed(up) if case.transposed else up)) if apart else None,
        )
        self.g = leaf(case.tokens, case.hidden).detach()
        norm = rms_norm if case.post_norm else None
        self.layout = ExpertLayout(
            ACTIVATIONS[case.activation], case.transposed, norm, identities=case.identities, zeros=case.zeros
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "router": self.router, **self.weights._asdict()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def expert(self, j: int, x: Tensor) -> Tensor:
        if j >= self.case.experts:
            return x if j < self.case.experts + self.case.identities else torch.zeros_like(x)
        up, down, up_bias, down_bias, scale, gate = (None if w is None else w[j] for w in self.weights)
        if gate is not None:
            up = torch.cat([gate, up], -1 if self.case.transposed else 0)
        hidden = x @ (up if self.case.transposed else up.T)
        hidden = ACTIVATIONS[self.case.activation](hidden if up_bias is None else hidden + up_bias)
        output = hidden @ (down if self.case.transposed else down.T)
        output = output if down_bias is None else output + down_bias
        output = rms_norm(output) if self.case.post_norm else output
        return output if scale is None else output * scale

    @functools.cached_property
    def index(self) -> Tensor:
        """The selection, made once: rounding must not change it between a layer and its truth."""
        return (self.x @ self.router.T).topk(self.case.k, -1).indices

    def host(self) -> tuple[Tensor, Tensor, Tensor]:
        """A sparse layer: output, scores, weights. Each expert sees only its own tokens."""
        scores = router_scores(self.x @ self.router.T, self.case.score)
        weights = scores.gather(1, self.index)
        if self.case.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = (weights * self.case.scaling).to(self.x.dtype)
        output = torch.zeros_like(self.x)
        for j in range(self.case.scored):
            token, slot = torch.where(self.index == j)
            output = output.index_add(0, token, self.expert(j, self.x[token]) * weights[token, slot, None])
        return output, scores, weights

    def attached(self, config: DenseMixerConfig, leading: tuple[int, ...] = (-1,)) -> Tensor:
        """The layer's output with DenseMixer on it; ``leading`` are the dimensions that hold the tokens."""
        output, scores, weights = self.host()
        through = straight_through(
            output.reshape(*leading, self.case.hidden),
            scores,
            x=self.x.reshape(*leading, self.case.hidden),
            index=self.index,
            weights=weights,
            experts=StackedExperts(self.weights, self.layout),
            score=self.case.score,
            renormalised=self.case.renormalised,
            config=config,
        )
        assert torch.equal(through.reshape(output.shape), output)
        return through

    def ours(self, config: DenseMixerConfig) -> dict[str, Tensor]:
        return self.gradients(self.attached(config))

    def truth(self, estimator: str) -> dict[str, Tensor]:
        formula = oracle.Formula(
            [lambda x, j=j: self.expert(j, x) for j in range(self.case.scored)],
            SCORES[self.case.score],
            self.case.renormalised,
            self.case.scaling,
        )
        return self.gradients(oracle.densemixer(self.x, self.x @ self.router.T, self.index, formula, estimator))

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        return dict(
            zip(
                self.leaves,
                torch.autograd.grad(output, list(self.leaves.values()), self.g.reshape(output.shape)),
                strict=True,
            )
        )
