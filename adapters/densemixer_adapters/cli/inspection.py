"""What DenseMixer would do with a model and what that costs, from its configuration alone: no weights are read.

Floating-point operations a token, with two for each multiplication and addition of a matrix product:

- forward F = 2·(parameters of the matrices that a token goes through) + attention. A token goes through k of the S
  experts that a layer's router scores, so in the mean through k/S of the E that have weights (mostly, S = E); attention
  is 4·(T/2)·heads·head_dim a layer for sequences of T tokens, causal.
- conventional training: 3·F, or 4·F with gradient checkpointing.
- DenseMixer, in the backward: X = 2·(parameters of all experts of its layers), the up projection of x and the down
  projection of g; with a budget b < 1, b·(1 − k/S) of that, and 2·E·hidden for each layer.

So a step takes 1 + X / 3F (or 4F) times as long where all matrix products run equally fast. Norms and activation
functions are left out on both sides; attention counts as full where it slides or is linear.

Bytes kept from the forward to the backward, a token: 4·(S + 1) for each of its layers, for the scores and the factor
between them and the weights; with a budget below 1 the layer's output and 4 bytes more; else with the estimator
``centered``, where weights are renormalised, 4·(k + 1) more. With gradient checkpointing for one layer at a time. The
option `workspace_mb` bounds the temporaries of the backward.

Where experts are spread over ranks, what each sends is that of `densemixer_adapters.collectives.bytes_sent`. Ranks
that have the same tokens divide both F and X by their number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from densemixer_adapters.collectives import bytes_sent
from densemixer_adapters.transformers import DenseMixerLayer, UnsupportedModelError, attach
from densemixer_adapters.transformers.cost import expert_operations, extra_operations, selected_experts
from densemixer_core import DenseMixerConfig


@dataclasses.dataclass(frozen=True)
class Report:
    """What `inspect_model` found.

    Args:
        model: The class of the model.
        model_type: Its configuration's.
        supported: Whether DenseMixer can train it.
        reason: Why not; empty if it can.
        layers: The names of the Mixture-of-Experts layers.
        router: The class of their routers.
        score: The function that makes scores of a router's logits.
        renormalised: Whether the selected experts' scores are divided by their sum.
        experts: How many experts with weights a layer has.
        without_weights: How many without.
        selected: How many of them a token goes through.
        modules_to_save: PEFT's setting that trains the routers in full beside LoRA.
        target_parameters: PEFT's setting that puts LoRA on the routers.
    """

    model: str
    model_type: str
    supported: bool
    reason: str = ""
    layers: tuple[str, ...] = ()
    router: str = ""
    score: str = ""
    renormalised: bool = False
    experts: int = 0
    without_weights: int = 0
    selected: int = 0
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one token of a training step costs.

    Args:
        forward: Floating-point operations of the model's forward.
        extra: Those that DenseMixer adds to the backward.
        saved: Bytes that DenseMixer keeps until then.
        saved_checkpointed: The same with gradient checkpointing.
        sent: Bytes that a rank sends in the backward, where the experts are spread over ranks.
    """

    forward: float
    extra: float
    saved: int
    saved_checkpointed: int
    sent: float = 0.0

    def ratio(self, checkpointed: bool = False) -> float:
        """The operations of a training step over those of a conventional one."""
        return 1 + self.extra / ((4 if checkpointed else 3) * self.forward)


def build_empty(path: str) -> Any:
    """The language model of a checkpoint's folder or hub id, on the meta device.

    Runs no code of the checkpoint's, and loads no kernels that its configuration names.

    Raises:
        ValueError: It is no configuration, or of a model that transformers itself doesn't know.
        Exception: Whatever transformers raises for a value that it can't use.
    """
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        PreTrainedConfig,
    )

    try:
        found, _ = PreTrainedConfig.get_config_dict(path)
    except (TypeError, AttributeError):  # what versions of transformers make of a number or a list there
        found = None
    if not isinstance(found, dict):
        raise ValueError("config.json is no JSON object")
    if "auto_map" in found and found.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers doesn't know its model type {found.get('model_type')!r}, and code that comes with a "
            "checkpoint isn't run here"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has no AutoModelForCausalLM of {config.model_type!r}, and no other class is read"
        )
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def inspect_model(model: Any) -> Report:
    """Look at a model, which may be on the meta device.

    Raises:
        ValueError: A token goes through none of its experts, or through more than there are.
    """
    name, model_type = type(model).__name__, model.config.model_type
    try:
        layers = _layers(model)
    except UnsupportedModelError as error:
        return Report(name, model_type, False, str(error))
    first = layers[0]
    router = ".".join(first.router_name.split(".")[-2:])
    return Report(
        name,
        model_type,
        True,
        layers=tuple(layer.name for layer in layers),
        router=type(first.router).__name__,
        score=first.score,
        renormalised=first.renormalised,
        experts=first.stacked_experts,
        without_weights=first.scored_experts - first.stacked_experts,
        selected=_selected(model, first),
        modules_to_save=(router,),
        target_parameters=tuple(f"{router}.{name}" for name, p in first.router.named_parameters() if p.dim() == 2),
    )


def estimate(
    model: Any, sequence: int, config: DenseMixerConfig | None = None, ep_size: int = 1, tp_size: int = 1
) -> Cost:
    """The cost of training a model, which may be on the meta device, with sequences of that many tokens.

    Args:
        model: The model.
        sequence: Tokens of a sequence.
        config: The options.
        ep_size: How many ranks the experts are spread over, by number; 1 to spread them by their width over `tp_size`.
        tp_size: How many of these have the same tokens, whose operations they divide.

    Raises:
        UnsupportedModelError: DenseMixer can't train it.
        ValueError: The options select layers that it doesn't have, or a token goes through none of its experts, or
            through more than there are; or experts and ranks don't divide.
    """
    options = config or DenseMixerConfig()
    if ep_size > 1 and ep_size % tp_size:
        raise ValueError(f"ep_size must be a multiple of tp_size, got {ep_size} and {tp_size}")
    forward = _attention(model, sequence) + _matrices(model)
    if options.estimator == "conventional":
        return Cost(forward, 0.0, 0, 0)
    layers, saved, sent = _layers(model, options), [], 0.0
    for layer in layers:
        experts, hidden = layer.stacked_experts, model.config.get_text_config().hidden_size
        kept = 4 * (layer.scored_experts + 1)
        # For ⟨g, y⟩: a copy of the output where not all experts are evaluated, else the selected experts' scores.
        if options.budget < 1:
            kept += 4 + hidden * model.dtype.itemsize
        elif options.estimator == "centered" and layer.renormalised:
            kept += 4 + 4 * _selected(model, layer)
        saved.append(kept)
        if experts % ep_size:
            raise ValueError(f"{layer.name}: {experts} experts can't be spread over {ep_size} ranks")
        sent += bytes_sent(
            1,
            hidden,
            experts,
            max(ep_size, tp_size),
            shared=tp_size,
            in_parts=ep_size == 1,
            sampled=options.budget < 1,
            itemsize=model.dtype.itemsize,
        )
    return Cost(forward, extra_operations(model, layers), sum(saved), max(saved), sent)


def _selected(model: Any, layer: DenseMixerLayer) -> int:
    """How many experts a token of a layer goes through.

    Raises:
        ValueError: None, or more than there are.
    """
    experts, selected = layer.scored_experts, selected_experts(model, layer) or 0
    if not 0 < selected <= experts:
        raise ValueError(f"{layer.name}: a token goes through {selected} of {experts} experts")
    return selected


def _layers(model: nn.Module, config: DenseMixerConfig | None = None) -> list[DenseMixerLayer]:
    with attach(model, config) as handle:
        return handle.layers


def _matrices(model: Any) -> float:
    """The operations of a token's forward in matrix products with parameters."""
    layers = _layers(model)
    stacked = {id(layer.experts) for layer in layers}
    through = (_selected(model, layer) / layer.scored_experts * layer.stacked_experts for layer in layers)
    operations = sum(experts * expert_operations(layer) for experts, layer in zip(through, layers, strict=True))
    for module in model.modules():
        if not isinstance(module, nn.Embedding) and id(module) not in stacked:
            operations += 2 * sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
    return operations


def _attention(model: Any, sequence: int) -> float:
    config = model.config.get_text_config()
    # Where layers differ in their heads, the configuration has one of its own for each.
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    operations = 0.0
    for layer in layers:
        heads = layer.num_attention_heads
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        operations += 4 * (sequence / 2) * heads * head_dim
    return operations
