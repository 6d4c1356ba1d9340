"""open-instruct's own scripts, where OPEN_INSTRUCT_DIR is a checkout of it.

They run with ``.venv/bin/python`` of the checkout, which must have this package and what the scripts import; vLLM and a
GPU aren't needed. The router never selects half of the experts, so conventional training leaves its rows for them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from installs import run
from safetensors.torch import load_file

CHECKOUT = Path(os.environ.get("OPEN_INSTRUCT_DIR", ""))

pytestmark = pytest.mark.skipif(
    "OPEN_INSTRUCT_DIR" not in os.environ,
    reason="set OPEN_INSTRUCT_DIR to a checkout of github.com/allenai/open-instruct with an environment in .venv",
)

RATE = 1e-3
COMMON = (
    "--model_name_or_path=my/moe --tokenizer_name_or_path=my/moe --max_seq_length=64 --per_device_train_batch_size=2 "
    f"--gradient_accumulation_steps=1 --learning_rate={RATE} --max_train_steps=1 --warmup_ratio=0 --seed=1 "
    "--do_not_randomize_output_dir --push_to_hub=false --with_tracking=false --try_launch_beaker_eval_jobs=false"
).split()
SCRIPTS = {
    "finetune": ("--dataset_mixer_list", "--dataset_mixer_list_splits", "--dataset_local_cache_dir"),
    "dpo_tune_cache": ("--mixer_list", "--mixer_list_splits", "--local_cache_dir"),
}
CACHES = {"finetune": "--dataset_cache_mode", "dpo_tune_cache": "--cache_mode"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache with a model `my/moe`, as HF_HOME, and data for each script."""
    import tiny_models

    home = tmp_path_factory.mktemp("hub")
    cache, revision = home / "hub" / "models--my--moe", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    tokenizer = tiny_models.byte_tokenizer("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    tokenizer.save_pretrained(cache / "snapshots" / revision)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = tiny_models.build("Qwen3Moe", **tiny_models.QWEN, vocab_size=len(tokenizer), **ends)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.2)
    tiny_models.make_half_unreachable(model)
    model.bfloat16().save_pretrained(cache / "snapshots" / revision)
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * n}] for n in range(2, 10)]
    data = {
        "finetune": [{"messages": turn} for turn in turns],
        "dpo_tune_cache": [{"chosen": a, "rejected": [a[0], b[1]]} for a, b in zip(turns, turns[::-1], strict=True)],
    }
    for script, rows in data.items():
        (home / f"{script}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


@pytest.mark.parametrize("script", SCRIPTS)
def test_routers_learn_from_experts_that_were_not_selected(home: Path, tmp_path: Path, script: str) -> None:
    assert change(home, tmp_path / "on", script, "1") > 0.5 * RATE
    assert change(home, tmp_path / "off", script, "0") < 0.05 * RATE


def change(home: Path, output: Path, script: str, enabled: str) -> float:
    """By how much a step of AdamW changes the routers' weights of experts that are never selected, on average."""
    mixer, split, cache = SCRIPTS[script]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        "-m",
        "densemixer_adapters.open_instruct",
    ]
    arguments = [mixer, home / f"{script}.jsonl", "1.0", split, "train", cache, home / "data", CACHES[script], "local"]
    named, more = [script], []
    if script == "dpo_tune_cache":  # it logs how well it uses a GPU
        named, more = [Path(__file__).with_name("without_gpu.py"), script], ["--logging_steps=2"]
    done = run(
        [CHECKOUT / ".venv" / "bin" / "python", *launcher, *named, *COMMON, *more, *arguments, "--output_dir", output],
        DENSEMIXER_ENABLED=enabled,
        ACCELERATE_USE_CPU="true",
        HF_HOME=str(home),
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(CHECKOUT),
        REFERENCE_LOGPROBS_CACHE_PATH=str(output.with_suffix(".logprobs")),  # one that is there is loaded to a GPU
        WANDB_MODE="disabled",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    before = load_file(next(home.glob("hub/*/snapshots/*/model.safetensors")))
    after = load_file(output / "model.safetensors")
    changes = [after[name][4:].float() - before[name][4:].float() for name in before if name.endswith("gate.weight")]
    return torch.stack(changes).abs().mean().item()
