"""``densemixer preflight`` on a small checkpoint: what it reads, prints and writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from densemixer_adapters.cli.app import app
from densemixer_adapters.cli.texts import UnusableDataError, batches_of

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
TEXT = "Grüße: a router sends each token to the experts with the largest scores. " * 40
SMALL = ("--seq-len", 16, "--batch-size", 2, "--batches", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_models.qwen3_moe(vocab_size=259).save_pretrained(folder)
    tiny_models.byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def preflight(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["preflight", *map(str, arguments)])


def found(*arguments: object) -> Any:
    done = preflight(*arguments, *SMALL, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout, parse_constant=pytest.fail)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib; run `nox -s transformers`"
)
def test_verdict_tables_and_page(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    done = preflight(checkpoint, text, *SMALL, "--learning-rate", 1e-4, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("routers would move the routing")
    for beginning in (
        "conventional ",
        "densemixer ",
        "centered ",
        "model.layers.0.mlp ",
        "model.layers.1.mlp ",
        "all ",
    ):
        assert any(line.startswith(beginning) for line in lines), beginning
    assert any(line.startswith("Looked at 4 batches of 30 tokens, for 1000 steps at a") for line in lines)
    assert (tmp_path / "out" / "preflight.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "preflight.html").read_text()
    assert "data:image/png;base64," in page
    assert str(text) in page
    assert "<td>model.layers.1.mlp</td>" in page


def test_as_json(checkpoint: Path, text: Path) -> None:
    report = found(checkpoint, text, "--steps", 100, "--learning-rate", 1e-3)
    assert report["layers"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert report["estimators"].keys() == {"conventional", "densemixer", "centered"}
    assert 0 < report["estimators"]["centered"]["change"]["whole"] <= report["at_most"]["whole"]
    assert (report["steps"], report["learning_rate"], report["dtype"]) == (100, 1e-3, "float32")
    assert report["verdict"].keys() == {"works", "text"}


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib; run `nox -s transformers`"
)
def test_json_and_page(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    assert found(checkpoint, text, "--output", tmp_path)["steps"] == 1000
    assert {file.name for file in tmp_path.iterdir()} == {"preflight.png", "preflight.html"}


def test_what_can_not_be_kept_is_not_begun(text: Path, tmp_path: Path) -> None:
    done = preflight(tmp_path / "none", text, "--output", text)
    assert done.exit_code == 2
    assert "can't write" in done.stderr or "needs matplotlib" in done.stderr


def test_no_such_folder(text: Path, tmp_path: Path) -> None:
    done = preflight(tmp_path / "none", text)
    assert done.exit_code == 2
    assert f"; there is no folder {tmp_path / 'none'} here" in done.stderr
    assert ".;" not in done.stderr


@pytest.mark.parametrize("command", ["inspect", "cost"])
def test_a_file_in_the_place_of_a_folder(command: str, checkpoint: Path) -> None:
    done = CliRunner().invoke(app, [command, str(checkpoint / "model.safetensors")])
    assert done.exit_code == 2
    assert done.stderr.endswith("model.safetensors is a file: name its folder\n")


def test_no_such_device(checkpoint: Path, text: Path) -> None:
    done = preflight(checkpoint, text, *SMALL[:-1], "cuda:99")
    assert done.exit_code == 2
    assert "can't use the device cuda:99" in done.stderr


def test_the_dtype_that_rounds(checkpoint: Path, text: Path) -> None:
    report = found(checkpoint, text, "--dtype", "bfloat16", "--learning-rate", 1e-6)
    assert 0.99 < report["estimators"]["densemixer"]["lost"]["whole"] <= 1
    assert report["verdict"]["works"] is False
    assert ", with 99.9 % of their updates lost to rounding" in report["verdict"]["text"]


def test_an_adapter_whose_routers_are_frozen(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, options in (("frozen", {}), ("trained", {"modules_to_save": ["mlp.gate"]})):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], **options))
        adapted.save_pretrained(tmp_path / name)
        report = found(tmp_path / name, text, "--learning-rate", 1e-4)
        assert report["frozen"] == (name == "frozen")
        assert ("all routers are frozen" in report["verdict"]["text"]) == (name == "frozen")
        model = adapted.unload()


# Data.


def written(folder: Path, *rows: object) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_texts_come_whole_and_one_after_the_other(tmp_path: Path, text: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer(TEMPLATE)
    says = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    file = written(tmp_path, {"text": "abc"}, {"messages": says}, "", {"text": TEXT})
    batches = batches_of(file, tokenizer, 2, 3, 8)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 8)] * 2
    rows = {tokenizer.decode(row) for batch in batches for row in batch["input_ids"]}
    whole = "abc<|im_end|><|im_start|>user\n2+2?<|im_end|><|im_start|>assistant\n4<|im_end|>" + TEXT
    ids = torch.tensor(tokenizer(whole)["input_ids"][:48]).view(6, 8)
    assert rows == {tokenizer.decode(row) for row in ids}

    (batch,) = batches_of(text, tokenizer, 1, 1, 64)
    assert tokenizer.decode(batch["input_ids"][0]) == tokenizer.decode(tokenizer(TEXT)["input_ids"][:64])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt: no such file"),
        ("data.parquet", "x", "data is a .txt file, or a .jsonl file"),
        (
            "data.txt",
            "too short",
            "has 9 tokens, and 4 batches of 2 sequences of 16 need 128: give more text, or lower",
        ),
        ("data.txt", b"\xff\xfe", "isn't UTF-8"),
        ("data.jsonl", '{"text": "a"}\nno JSON', "data.jsonl, line 2: no JSON"),
        ("data.jsonl", '{"prompt": "a"}', "line 1: no object with a `text`, or with `messages`"),
        ("data.jsonl", '{"messages": [1]}', "line 1: no object with a `text`, or with `messages`"),
    ],
)
def test_data_that_cannot_be_used(
    name: str, content: str | bytes | None, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = preflight(checkpoint, tmp_path / name, *SMALL)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer(TEMPLATE)
    tokenizer.chat_template = None
    with pytest.raises(UnusableDataError, match="chat template can't use `messages`: "):
        batches_of(written(tmp_path, {"messages": [{"role": "user", "content": "2+2?"}]}), tokenizer, 2, 1, 2)


# Models.


def test_a_model_without_experts(tmp_path: Path, text: Path) -> None:
    transformers.Qwen3Config(hidden_size=32, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
    done = preflight(tmp_path, text)
    assert done.exit_code == 1
    assert "no Mixture-of-Experts layers" in done.stderr


def test_a_router_that_is_not_known(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from densemixer_adapters.transformers import routers

    monkeypatch.delitem(routers.ROUTERS, "Qwen3MoeTopKRouter")
    done = preflight(checkpoint, text)
    assert done.exit_code == 1
    assert "register_router" in done.stderr


def test_no_model(tmp_path: Path, text: Path) -> None:
    done = preflight(tmp_path, text)
    assert done.exit_code == 2
    assert f"can't use the configuration of {tmp_path}" in done.stderr


def test_no_tokenizer(tmp_path: Path, text: Path) -> None:
    tiny_models.qwen3_moe(vocab_size=259).config.save_pretrained(tmp_path)
    done = preflight(tmp_path, text)
    assert done.exit_code == 2
    assert f"can't use the tokenizer of {tmp_path}" in done.stderr
    assert "save it there with tokenizer.save_pretrained" in done.stderr


def test_no_weights(tmp_path: Path, text: Path) -> None:
    tiny_models.qwen3_moe(vocab_size=259).config.save_pretrained(tmp_path)
    tiny_models.byte_tokenizer(TEMPLATE).save_pretrained(tmp_path)
    done = preflight(tmp_path, text, *SMALL)
    assert done.exit_code == 2
    assert f"can't use the model of {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "int8", "got 'int8'"),
        ("--batches", 3, "must be even"),
        ("--learning-rate", 0, "must be above 0"),
        ("--steps", 0, "'--steps'"),
        ("--device", "nowhere", "nowhere"),
    ],
)
def test_options_that_are_wrong(option: str, value: object, message: str, checkpoint: Path, text: Path) -> None:
    done = preflight(checkpoint, text, *SMALL, option, value)
    assert done.exit_code == 2
    assert message in done.stderr
