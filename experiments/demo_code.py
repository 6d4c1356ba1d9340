"""What the experiment shares with the demo: its data, its batches, its tokenizer and its measure of routing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples" / "demo"))

from batches import Batch, Encoded, collate, encode, schedule
from data import Example, library_examples, library_files
from model import train_tokenizer
from probe import routing_change, selected_experts

__all__ = [
    "Batch",
    "Encoded",
    "Example",
    "collate",
    "encode",
    "library_examples",
    "library_files",
    "routing_change",
    "schedule",
    "selected_experts",
    "train_tokenizer",
]
