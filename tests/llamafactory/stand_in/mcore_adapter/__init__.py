"""A stand-in for ``mcore_adapter``: what LLaMA-Factory's workflows import of it, around a small model of Megatron Core.

Models, schedule, DDP and optimizer are Megatron Core's own, and the data it trains on are the tests'. What isn't
mcore_adapter's is how a model comes from a checkpoint, and the loop around the steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import Seq2SeqTrainingArguments as Base


@dataclasses.dataclass
class Seq2SeqTrainingArguments(Base):
    """Those that the workflows read, and the example has."""

    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int | None = None
    moe_token_dispatcher_type: str = "allgather"
    moe_grouped_gemm: bool | None = None
    recompute_granularity: str | None = None
    use_distributed_optimizer: bool = False
    sequence_packing: bool = False
    additional_configs: dict[str, Any] = dataclasses.field(default_factory=dict)


TrainingArguments = Seq2SeqTrainingArguments
