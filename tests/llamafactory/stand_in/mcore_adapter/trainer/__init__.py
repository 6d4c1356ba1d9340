"""Takes a step on the tests' own data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import training


class McaTrainer:
    def __init__(self, model: Any, args: Any, **others: Any) -> None:
        self.model, self.args = model, args
        self.state = SimpleNamespace(log_history=[])

    def train(self, checkpoint: str | None) -> Any:
        if any(parameter.requires_grad for _, parameter in self.model.named_parameters()):
            wrapped, optimizer = training.wrap(self.model.get_models())
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            losses = training.forward_backward(wrapped)
            optimizer.step()
            self.log({"loss": torch.stack(losses).mean().item()})
        return SimpleNamespace(metrics={})

    def log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append(logs)

    def save_model(self) -> None:
        folder = Path(self.args.output_dir) / "iter_0000001" / "mp_rank_00"
        folder.mkdir(parents=True)
        torch.save({"model": self.model.state_dict()}, folder / "model_optim_rng.pt")
        Path(self.args.output_dir, "mca_config.json").write_text(self.model.config.to_json_string())

    def add_callback(self, callback: Any) -> None: ...

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None: ...

    save_metrics = log_metrics

    def save_state(self) -> None: ...

    def is_world_process_zero(self) -> bool:
        return False


class DPOTrainer(McaTrainer):
    def __init__(self, ref_model: Any, train_config: Any, **others: Any) -> None:
        super().__init__(**others)
        self.ref_model = ref_model
