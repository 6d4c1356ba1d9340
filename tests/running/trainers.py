"""Cells of the trainers of transformers and TRL. Their losses are theirs, so the oracle goes through them too.

In every training step, the trainer's own step runs once more on the oracle, with the same inputs; right before the
optimizer's first step, the gradients are compared.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import torch
from datasets import Dataset
from device import DEVICE
from runs import selections
from setting import FAMILY, Gradients, Result, batch, build, gradients_of, judge
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from densemixer_adapters.transformers import apply_densemixer, attached_layers

ESTIMATORS = ("densemixer", "conventional")


class Recorder(TrainerCallback):
    """Makes a trainer take every step on the oracle too."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.oracles = {estimator: copy_without_densemixer(trainer.model).double() for estimator in ESTIMATORS}
        self.own_step = trainer.training_step
        self.gradients: Gradients = {}
        trainer.training_step = self.step
        trainer.add_callback(self)

    def step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        prepared = trainer._prepare_inputs(inputs)  # GRPO generates here, so once
        trainer._prepare_inputs = lambda inputs: copy.copy(prepared)
        with selections(FAMILY, model) as indices:
            loss = self.own_step(model, inputs, *args, **kwargs)
        for estimator, truth in self.oracles.items():
            blocks = FAMILY.blocks(truth)
            for block, index in zip(blocks, indices[: len(blocks)], strict=True):
                block.forward = types.MethodType(with_router(FAMILY.oracle_forward(index, estimator)), block)
            with in_float64(getattr(trainer, "ref_model", None)), oracle.Float64():  # which has no way back to float32
                # Not the step of TRL, which counts.
                Trainer.training_step(trainer, truth, inputs, *args, **kwargs)
        del trainer._prepare_inputs
        return loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.gradients = gradients_of(model)
            self.truth = {estimator: gradients_of(model) for estimator, model in self.oracles.items()}

    def result(self) -> Result:
        return judge(self.gradients, *(self.truth[estimator] for estimator in ESTIMATORS))


@contextlib.contextmanager
def in_float64(model: nn.Module | None) -> Iterator[None]:
    """There and back without a change."""
    if model is not None:
        model.double()
    yield
    if model is not None:
        model.float()


def copy_without_densemixer(model: nn.Module) -> nn.Module:
    """With all that the trainer has done to the model."""
    model = copy.deepcopy(model)
    for layer in attached_layers(model):
        layer.remove()
    return model


def with_router(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The router is called as a module too: TRL's load-balancing loss takes its output from there."""

    def run(block: Any, hidden_states: Tensor) -> Tensor:
        block.gate(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return forward(block, hidden_states)

    return run


def train(make: Callable[[Any, str], Trainer]) -> Result:
    torch.manual_seed(0)
    model = build()
    apply_densemixer(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(model, folder)
        recorder = Recorder(trainer)
        trainer.train()
    return recorder.result()


def common(folder: str, micro_batches: int = 1, checkpointing: bool = False) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 4 // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": DEVICE == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 128)}}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def sentences(first: int, last: int) -> list[str]:
    """Of different lengths."""
    rows = batch()[:, first:last].tolist()
    return [" ".join(f"w{i}" for i in row[: len(row) - n]) for n, row in enumerate(rows)]


def transformers_trainer(model: Any, folder: str, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in batch().tolist()]
    return Trainer(model, TrainingArguments(**common(folder, **options)), train_dataset=rows)


def sft(model: Any, folder: str, packing: bool = False, **options: Any) -> Trainer:
    return SFTTrainer(
        model,
        args=SFTConfig(**common(folder, **options), packing=packing, max_length=24),
        train_dataset=Dataset.from_dict({"text": sentences(0, 12) * (4 if packing else 1)}),
        processing_class=tokenizer(),
    )


def dpo(reference: Any, model: Any, folder: str, **options: Any) -> Trainer:
    rows = {"prompt": sentences(0, 6), "chosen": sentences(6, 12), "rejected": sentences(4, 10)}
    return DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(**common(folder, **options)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )


def grpo(model: Any, folder: str, **options: Any) -> Trainer:
    def many_kinds(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) + len(text) / 100 for text in completions]

    return GRPOTrainer(
        model,
        reward_funcs=many_kinds,
        args=GRPOConfig(**common(folder, **options), num_generations=4, max_completion_length=8),
        train_dataset=Dataset.from_dict({"prompt": sentences(0, 6)}),
        processing_class=tokenizer(),
    )


def train_dpo(**options: Any) -> Result:
    """The reference model must stay as it is."""
    reference = FAMILY.build("eager")  # which has a float64, for the oracle
    before = copy.deepcopy(reference.state_dict())
    result = train(functools.partial(dpo, reference, **options))
    after = reference.state_dict()
    result.more["reference"] = {
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "gradients": [name for name, parameter in reference.named_parameters() if parameter.grad is not None],
        "hooks": [name for name, module in reference.named_modules() if module._forward_hooks],
    }
    return result


def cells() -> Iterator[tuple[str, Callable[[], Result]]]:
    ways = {"Trainer": transformers_trainer, "SFTTrainer": sft, "GRPOTrainer": grpo}
    variations = {
        "plain": {},
        "gradient accumulation": {"micro_batches": 2},
        "checkpointing": {"checkpointing": True},
    }
    for variation, options in variations.items():
        for name, way in ways.items():
            yield f"{name}: {variation}", functools.partial(train, functools.partial(way, **options))
        yield f"DPOTrainer: {variation}", functools.partial(train_dpo, **options)
    yield "SFTTrainer: packing", functools.partial(train, functools.partial(sft, packing=True))
