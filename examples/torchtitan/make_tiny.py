"""Write a tokenizer that takes each letter for a token, and some text, into the folder `tiny`."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

folder = Path("tiny")
(folder / "text").mkdir(parents=True, exist_ok=True)

tokens = ["<unknown>", "<end>", *string.printable]
tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<unknown>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))

lines = [json.dumps({"text": f"{n} times {m} is {n * m}. " * 8}) for n in range(12) for m in range(12)]
(folder / "text" / "train.json").write_text("\n".join(lines))
