"""The models whose shapes are measured."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """Dimensions of a model, by its published configuration.

    Args:
        config: The name of its configuration's class in transformers.
        hidden: Width of the model.
        ffn: Width of an expert.
        experts: Experts of a layer.
        top_k: How many of them a token goes through.
        heads: Attention heads, of 128 numbers each.
        kv_heads: Those of keys and values.
        vocabulary: Number of tokens.
        layers: Layers of the whole model.
        ffn_option: What the configuration calls the width of an expert.
        experts_option: What it calls the number of experts.
        options: Other options of the configuration.
        in_original: Whether the original densemixer covers it.
    """

    config: str
    hidden: int
    ffn: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    ffn_option: str = "moe_intermediate_size"
    experts_option: str = "num_experts"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_original: bool = True

    def scaled(self, divisor: int) -> Shape:
        """All widths divided; experts and top-k as they are."""
        widths = {name: getattr(self, name) // divisor for name in ("hidden", "ffn", "heads", "vocabulary")}
        options = {name: value // divisor if type(value) is int else value for name, value in self.options.items()}
        return dataclasses.replace(self, **widths, kv_heads=max(1, self.kv_heads // divisor), options=options)

    def shallow(self, layers: int) -> Shape:
        """Fewer layers, and as many fewer tokens in the vocabulary, so that the head's share of a step stays."""
        return dataclasses.replace(self, vocabulary=self.vocabulary * layers // self.layers, layers=layers)

    def model_config(self, tokens: int) -> Any:
        """The configuration for the installed transformers."""
        import transformers

        return getattr(transformers, self.config)(
            hidden_size=self.hidden,
            **{self.ffn_option: self.ffn, self.experts_option: self.experts},
            num_experts_per_tok=self.top_k,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=tokens,
            **self.options,
        )

    def extra_operations(self, tokens: int, budget: float = 1.0) -> float:
        """Floating-point operations that DenseMixer adds to one layer's backward."""
        if budget == 1:
            return tokens * self.experts * 6 * self.hidden * self.ffn
        means = tokens * self.experts * 2 * self.hidden
        return budget * tokens * (self.experts - self.top_k) * 6 * self.hidden * self.ffn + means


SHAPES = {
    "Qwen3-30B-A3B": Shape(
        "Qwen3MoeConfig", 2048, 768, 128, 8, 32, 4, 151936, 48, options={"head_dim": 128, "norm_topk_prob": True}
    ),
    "OLMoE-1B-7B": Shape("OlmoeConfig", 2048, 1024, 64, 8, 16, 16, 50304, 16, ffn_option="intermediate_size"),
    "Qwen1.5-MoE-A2.7B": Shape(
        "Qwen2MoeConfig", 2048, 1408, 60, 4, 16, 16, 151936, 24, options={"shared_expert_intermediate_size": 5632}
    ),
    "Mixtral-8x7B": Shape(
        "MixtralConfig",
        4096,
        14336,
        8,
        2,
        32,
        8,
        32000,
        32,
        ffn_option="intermediate_size",
        experts_option="num_local_experts",
        in_original=False,
    ),
}
