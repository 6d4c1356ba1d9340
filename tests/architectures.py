"""Every Mixture-of-Experts architecture of the installed transformers, found in its source, as a tiny random model."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from torch import Tensor, nn

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
LOOKALIKE = re.compile(r"^class \w*(Experts?|MoE|Moe|Router|SparseMLP)\w*\(nn\.", re.MULTILINE)
OPTION = re.compile(r"num_(local_)?experts|routed_experts|moe_num|experts_per_tok")

IMAGE = 63  # the id of a token that stands for a piece of an image

# What a tiny model's configuration says, where it has such an attribute: 8 experts, 3 of them selected.
TINY: dict[str, Any] = dict(
    vocab_size=64,
    unpadded_vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    # experts and routers
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    moe_num_experts=8,
    num_experts_per_tok=3,
    top_k_experts=3,
    moe_top_k=3,
    moe_topk=3,
    moe_k=3,
    n_group=2,
    topk_group=2,
    zero_expert_num=2,
    router_hidden_size=16,
    moe_hidden_size=32,
    moe_intermediate_size=16,
    expert_ffn_hidden_size=16,
    ffn_hidden_size=24,
    n_shared_experts=1,
    shared_expert_intermediate_size=16,
    shared_intermediate_size=16,
    dense_intermediate_size=24,
    moe_shared_expert_intermediate_size=16,
    shared_experts_intermediate_size=16,
    # which layers have experts
    mlp_layer_types=["sparse", "sparse"],
    first_k_dense_replace=0,
    mlp_only_layers=[],
    num_dense_layers=0,
    # attention: low rank, indexed, linear, state space
    q_lora_rank=16,
    kv_lora_rank=16,
    o_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    sliding_window=8,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_head_dim=8,
    index_n_heads=2,
    index_head_dim=16,
    linear_head_dim=8,
    linear_num_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=8,
    chunk_size=16,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=8,
    # towers of other modalities
    depth=2,
    num_heads=4,
    embed_dim=32,
    d_model=32,
    output_dim=32,
    out_hidden_size=32,
    text_hidden_size=32,
    projection_hidden_dim=32,
    projection_intermediate_size=32,
    position_embedding_size=16,
    output_channels=8,
    downsample_channels=[8, 32],
    output_proj_dims=32,
    projector_hidden_size=32,
    adapter_out_dim=32,
    patch_size=4,
    image_size=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    downsample_hidden_size=16,
)


def _rope(*sections: int) -> dict[str, Any]:
    return dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0, mrope_section=list(sections))


def _tower(model_type: str) -> dict[str, Any]:
    return dict(model_type=model_type, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


# Where that doesn't make a valid or telling model; a mapping goes to the part of the configuration with its name.
OPTIONS: dict[str, dict[str, Any]] = {
    "aria": dict(vision_config=_tower("idefics3_vision")),
    "dbrx": dict(attn_config=dict(rope_theta=1e4)),
    "deepseek_v4": dict(mlp_layer_types=["hash_moe", "moe"]),
    "diffusion_gemma": dict(vision_config=dict(**_tower("gemma4_vision"), head_dim=16, position_embedding_size=16)),
    "doge": dict(is_moe=True, num_experts=16),
    "dots3_note": dict(
        image_token_id=IMAGE,
        vision_config=dict(adapter_in_dim=32, router_scaling_factor=1.5),
        audio_config=dict(adapter_input_size=32),
    ),
    "ernie4_5_vl_moe": dict(text_config=dict(moe_intermediate_size=[16, 24], rope_parameters=_rope(1, 1, 2))),
    "gemma4": dict(enable_moe_block=True),
    "glm4v_moe": dict(text_config=dict(rope_parameters=_rope(2, 1, 1))),
    "glm5_next": dict(qk_rope_head_dim=0),
    "granitemoehybrid": dict(mamba_n_heads=4),
    "hy_v4_vl": dict(text_config=dict(rope_parameters=_rope(2, 1, 1))),
    "inkling2_loop": dict(
        # The second layer runs three times in a forward.
        text_config=dict(n_layers_per_attn_res_block=1, loop_layer_index_start=1, loop_layer_index_end=2),
        vision_config=dict(**_tower("inkling2_vision"), text_hidden_size=32, projection_hidden_dim=32),
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mimo_v2_flash": dict(num_key_value_heads=2),
    "mistral_large4": dict(vision_config=_tower("pixtral")),
    "muse_spark": dict(audio_config=dict(num_hidden_layers=4, hidden_sizes=[8] * 4)),
    "nemotron_h": dict(n_groups=2),
    "nllb_moe": dict(encoder_sparse_step=1, decoder_sparse_step=1),
    "qwen3_omni_moe": dict(shared_expert_intermediate_size=16),
    "zaya": dict(num_experts_per_tok=1),
}

# What to build where the first model with a language head, and the towers of other modalities, isn't all there is.
CLASSES: dict[str, list[str]] = {
    "diffusion_gemma": ["DiffusionGemmaForBlockDiffusion"],
    "inkling": ["InklingForCausalLM"],
    "qwen3_omni_moe": ["Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeTalkerModel"],
}


# Folders with a class named after a part of a Mixture-of-Experts, or an option about experts, and no layer of it.
NO_ROUTER = {
    "granite_docling": "its router picks a resolution for an image, not experts",
    "nemotron3_5_transcribe": "its language model is nemotron_h",
    "vitpose_backbone": "the data set's index picks the expert; nothing is scored",
}


@functools.cache
def _sources() -> dict[str, str]:
    """The modeling code of each folder that has anything to do with experts."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        options = path.with_name(path.name.replace("modeling", "configuration"))
        mentions = options.exists() and OPTION.search(options.read_text(encoding="utf-8"))
        if DECORATED.search(text) or LOOKALIKE.search(text) or mentions:
            found[path.parent.name] = text
    return found


def found() -> list[str]:
    """The folders of all architectures with Mixture-of-Experts layers, by the look of their source."""
    return [folder for folder in _sources() if folder not in NO_ROUTER]


def experts_classes(folder: str) -> set[str]:
    """The names of a folder's classes of experts that follow the contract of transformers 5."""
    return set(DECORATED.findall(_sources()[folder]))


def model_classes(folder: str) -> list[type[nn.Module]]:
    """The models to build: for text and images where there is one; else for text, with a language head if possible."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    classes = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and hasattr(value, "config_class")
    }
    if folder in CLASSES:
        return [classes[name] for name in CLASSES[folder] if name in classes]
    for ending in ("ForConditionalGeneration", "ForCausalLM", "Model"):
        for name, value in classes.items():
            if name.endswith(ending) and "PreTrainedModel" not in name:
                return [value]
    raise LookupError(f"{folder}: which of {', '.join(classes)} to build?")


def build(folder: str, cls: type[nn.Module] | None = None, **options: Any) -> nn.Module:
    cls = cls or model_classes(folder)[0]
    config = _configure(cls.config_class, {**OPTIONS.get(folder, {}), **options})
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        tiny_models.randomise((name, tensor) for name, tensor in tensors if "inv_freq" not in name)
        for name, tensor in tensors:
            if name.endswith("balancing_biases"):  # would decide alone
                tensor.zero_()
            if name.endswith("tid2eid"):  # which experts each token id is sent to
                tensor.copy_(torch.rand(len(tensor), 8).argsort(-1)[:, : tensor.shape[1]])
    return model.train()


def _configure(cls: type[Any], options: dict[str, Any]) -> Any:
    """A tiny configuration and its parts. Options go to all of them, those in a mapping to the part of that name."""
    parts = {name: part for name, part in cls.sub_configs.items() if part.__name__ != "AutoConfig"}
    own = {key: value for key, value in options.items() if key not in parts}
    known = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map}
    values: dict[str, Any] = {key: value for key, value in TINY.items() if key in known}
    values |= {name: _configure(part, {**own, **options.get(name, {})}) for name, part in parts.items()}
    config = cls(**{**values, **own})
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    return config


def tokens() -> Tensor:
    return torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def inputs(model: nn.Module) -> dict[str, Any]:
    """A training batch: text, and whatever else it takes to reach all experts."""
    name = type(model).__name__
    ids = tokens()
    generator = torch.Generator().manual_seed(2)
    if name == "Qwen3OmniMoeTalkerModel":  # speaks what the thinker has embedded
        return dict(inputs_embeds=torch.randn(*ids.shape, 32, generator=generator), use_cache=False)
    if name == "DiffusionGemmaForBlockDiffusion":
        return dict(input_ids=ids, decoder_input_ids=ids.flip(1))
    if name.startswith("Ernie4_5_VL"):
        return dict(input_ids=ids, moe_mm_token_type_ids=(ids % 2).int(), use_cache=False)
    if name == "Dots3NoteForConditionalGeneration":
        ids[:, 2:6] = IMAGE  # 4 x 4 patches, of which 2 x 2 become a token
        pixels = torch.randn(32, 3 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
        return dict(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, use_cache=False)
    return dict(input_ids=ids, use_cache=False)
