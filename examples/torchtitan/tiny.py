"""A tiny Mixture-of-Experts model of torchtitan, to try the real program anywhere: `--module tiny --config moe`."""

from __future__ import annotations

from typing import Any

import torchtitan.models.qwen3 as qwen3
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.trainer import Trainer

FOLDER = "tiny"
"""Where `make_tiny.py` puts a tokenizer and text."""

VOCABULARY, HIDDEN, EXPERTS, SELECTED = 128, 32, 8, 2


def model_spec() -> Any:
    """Qwen3's Mixture-of-Experts blocks, two of them."""
    spec = qwen3.model_registry("debugmodel_moe")
    spec.model = qwen3.Qwen3Model.Config(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        norm=qwen3._qwen3_norm(HIDDEN),
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=HIDDEN, param_init=qwen3._EMBEDDING_INIT
        ),
        lm_head=Linear.Config(in_features=HIDDEN, out_features=VOCABULARY, param_init=qwen3._LINEAR_INIT),
        layers=qwen3._build_qwen3_moe_layers(
            fuse_qkv=True,
            n_layers=2,
            dim=HIDDEN,
            n_heads=4,
            n_kv_heads=2,
            head_dim=16,
            moe_hidden_dim=24,
            num_experts=EXPERTS,
            top_k=SELECTED,
            attn_backend="flex",
            rope=CosSinRoPE.Config(dim=16, max_seq_len=128, theta=1e6),
            moe_comm_backend="standard",
        ),
    )
    return spec


def moe() -> Trainer.Config:
    """The configuration, for torchtitan's command line."""
    return Trainer.Config(
        model_spec=model_spec(),
        hf_assets_path=FOLDER,
        loss=CrossEntropyLoss.Config(),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path=f"{FOLDER}/text"),
        optimizer=default_adamw(lr=1e-3),
        metrics=MetricsProcessor.Config(log_freq=1),
        # The default, spmd_types, wants a newer FSDP2 than that of torch 2.13 where there are several ranks.
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        training=TrainingConfig(local_batch_size=2, seq_len=64, steps=3, disable_cuda_graphs=True),
        checkpoint=CheckpointManager.Config(enable=False),
    )
