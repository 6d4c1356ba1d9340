"""The loss if one token's routing were another in one layer, and what the estimators predict of it.

Notation, for a token: p_j is the router's score of expert j, S the sum over the selected experts, E_j(x) the output of
j, y = Σ_selected p_i/S · E_i(x) the layer's output (weights are renormalised), g = dL/dy, L the sum of the sequence's
negative log-likelihoods.

To **add** a share f of the unselected expert j makes y = (Σ_selected p_i·E_i(x) + f·p_j·E_j(x)) / (S + f·p_j), and for
f = 1 that is what the layer would compute if j were selected too. To **swap** puts j in the place of the selected
expert m with the smallest score, and renormalises. The layers above route anew, as they would.

An estimator gives each score a gradient G. For selected experts this is the host's own, the same in all of them: the
derivative of L as long as nobody joins or leaves, ⟨g, E_i(x) − y⟩/S. So to first order in what the scores do, the loss
changes by f·p_j·G_j if j is added, and by p_j·G_j − p_m·G_m if it is swapped in.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from densemixer_adapters.observer import Forward
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig


class Estimates(NamedTuple):
    """Of one layer, for the tokens of all sequences: [sequences, tokens, ...].

    Attributes:
        scores: p, [..., experts].
        index: The selected experts, [..., k].
        x: The router's input, [..., hidden].
        gradients: By estimator, dL/dp of all experts, [..., experts].
    """

    scores: Tensor
    index: Tensor
    x: Tensor
    gradients: dict[str, Tensor]


class Effects(NamedTuple):
    """Change of the loss for each unselected expert of a token, in ascending order: [experts - k].

    Attributes:
        experts: Which they are.
        added: By the share f that is added.
        swapped: Each in the place of the weakest selected one.
    """

    experts: Tensor
    added: dict[float, Tensor]
    swapped: Tensor


def in_float64(model: Any) -> Any:
    """The model in float64 throughout, with its own normalisation and softmax too, which are in float32 otherwise."""
    model = model.double().eval()
    model.set_experts_implementation("eager")  # the others know no float64
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, Qwen3MoeRMSNorm):
                replacement = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                replacement.weight = norm.weight
                setattr(module, name, replacement)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(_route_in_float64)
    return model


def _route_in_float64(router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits, _, index = output
    weights = logits.softmax(-1).gather(-1, index)
    return logits, weights / weights.sum(-1, keepdim=True), index


def sequence_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The sum of the negative log-likelihoods of each sequence's tokens, in nats; [sequences]."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).sum(1)


def estimate(model: Any, ids: Tensor) -> list[Estimates]:
    """What each estimator gives the scores, layer by layer, for ids of [sequences, tokens].

    "densemixer" and "centered" are DenseMixer on that layer alone, whose g is then the derivative of the loss. Where it
    is on all layers, as in training, g holds what the layers above add too: that is "densemixer, all layers" and so on.
    """
    found: list[Estimates] = []
    for layer in range(len(model.model.layers)):
        gradients = {}
        for estimator in ("densemixer", "centered"):
            config = DenseMixerConfig(estimator, layers=[layer])
            (seen,) = _backward(model, ids, config)
            gradients |= {"conventional": seen.host, estimator: seen.host + seen.extra}
        found.append(Estimates(seen.scores, seen.index, seen.x, gradients))
    for estimator in ("densemixer", "centered"):
        for layer, seen in enumerate(_backward(model, ids, DenseMixerConfig(estimator))):
            found[layer].gradients[f"{estimator}, all layers"] = seen.host + seen.extra
    shape = tuple(ids.shape)
    return [
        Estimates(
            *(tensor.unflatten(0, shape) for tensor in (layer.scores, layer.index, layer.x)),
            {name: gradient.unflatten(0, shape) for name, gradient in layer.gradients.items()},
        )
        for layer in found
    ]


class _Seen:
    """What passes by in a layer, [tokens, ...], in the order in which it does.

    Attributes:
        index: The selected experts.
        scores, x: Of all experts; the input of the router and the experts.
        extra: The gradient that DenseMixer adds to the scores.
        weights_gradient: That of the selected experts' weights p_i/S.
    """

    index: Tensor
    scores: Tensor
    x: Tensor
    extra: Tensor
    weights_gradient: Tensor

    @property
    def host(self) -> Tensor:
        """The host's own gradient of the scores, from that of the weights."""
        selected = self.scores.gather(-1, self.index)
        total = selected.sum(-1, keepdim=True)
        mean = (self.weights_gradient * selected / total).sum(-1, keepdim=True)
        return torch.zeros_like(self.scores).scatter(-1, self.index, (self.weights_gradient - mean) / total)


def _backward(model: Any, ids: Tensor, config: DenseMixerConfig) -> list[_Seen]:
    """One backward pass of the loss; of each layer that DenseMixer is attached to."""
    seen: dict[str, _Seen] = {}

    def selection(name: str, experts: Any, args: tuple[Tensor, ...]) -> None:
        here = seen[name] = _Seen()
        here.index = args[1]
        args[2].register_hook(functools.partial(setattr, here, "weights_gradient"))

    def observe(name: str, forward: Forward, output: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert scores is not None
        here = seen[name]
        here.scores, here.x = scores.detach(), forward.x.detach().reshape(len(scores), -1)
        scores = scores.clone()  # the gradient here is what DenseMixer adds, and nothing else
        scores.register_hook(functools.partial(setattr, here, "extra"))
        return output, scores

    with apply_densemixer(model, config) as handle:
        hooks = []
        for layer in handle.layers:
            layer.observer = functools.partial(observe, layer.name)
            hooks.append(layer.experts.register_forward_pre_hook(functools.partial(selection, layer.name)))
        sequence_losses(model(input_ids=ids, use_cache=False).logits, ids).sum().backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return list(seen.values())


def predictions(estimates: Estimates, sequence: int, token: int, estimator: str) -> Effects:
    """To first order, what an estimator says about the `effects` on that token; ``added`` is for f = 1."""
    scores, index = estimates.scores[sequence, token], estimates.index[sequence, token]
    moved = scores * estimates.gradients[estimator][sequence, token]
    experts = unselected(scores, index)
    weakest = index[scores[index].argmin()]
    return Effects(experts, {1.0: moved[experts]}, moved[experts] - moved[weakest])


@torch.no_grad()
def effects(
    model: Any, experts: Any, ids: Tensor, scores: Tensor, index: Tensor, token: int, shares: tuple[float, ...]
) -> Effects:
    """Force each unselected expert into the routing of one token, in one layer, and measure the loss.

    Args:
        experts: That layer's module of this name.
        ids: One sequence, [tokens].
        scores: p of that token, [experts].
        index: The experts that it selects, [k].
        shares: The f that are added.
    """
    others = unselected(scores, index)
    weakest = scores[index].argmin()
    selections = [(torch.cat([index, index[:1]]), torch.cat([scores[index], scores.new_zeros(1)]))]  # as it is
    for share in shares:
        for j in others:
            selections.append((torch.cat([index, j[None]]), torch.cat([scores[index], share * scores[j, None]])))
    for j in others:
        place = torch.arange(len(index), device=index.device) == weakest
        swapped = torch.where(place, j, index)
        selections.append((torch.cat([swapped, index[:1]]), torch.cat([scores[swapped], scores.new_zeros(1)])))
    chosen = torch.stack([selected for selected, _ in selections])
    mass = torch.stack([part for _, part in selections])
    losses = _forced_losses(model, experts, ids, token, chosen, mass / mass.sum(1, keepdim=True))
    *added, swapped_losses = (losses[1:] - losses[0]).split(len(others))
    return Effects(others, dict(zip(shares, added, strict=True)), swapped_losses)


def unselected(scores: Tensor, index: Tensor) -> Tensor:
    """The experts that aren't in the index, in ascending order."""
    return torch.ones_like(scores, dtype=torch.bool).scatter(0, index, False).nonzero().squeeze(1)


def _forced_losses(model: Any, experts: Any, ids: Tensor, token: int, index: Tensor, weights: Tensor) -> Tensor:
    """The sequence's loss for each routing of the token, [routings]; index and weights are [routings, k + 1]."""
    routings = len(index)

    def force(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, host_index, host_weights = args
        # One more place for every token; for all others it holds an expert with the weight 0.
        all_index = torch.cat([host_index, host_index[:, :1]], 1).view(routings, len(ids), -1)
        all_weights = torch.cat([host_weights, torch.zeros_like(host_weights[:, :1])], 1).view(routings, len(ids), -1)
        all_index[:, token], all_weights[:, token] = index, weights.to(host_weights.dtype)
        return x, all_index.flatten(0, 1), all_weights.flatten(0, 1)

    hook = experts.register_forward_pre_hook(force)
    try:
        rows = ids.expand(routings, -1)
        return sequence_losses(model(input_ids=rows, use_cache=False).logits, rows)
    finally:
        hook.remove()
