"""``densemixer report`` on runs of the HF Trainer and on what verl writes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from families import FAMILIES, tokens
from transformers import Trainer, TrainingArguments

from densemixer_adapters.callback import DenseMixerCallback
from densemixer_adapters.cli.app import app
from densemixer_adapters.metrics import names
from densemixer_adapters.metrics.names import TITLES
from densemixer_adapters.transformers import apply_densemixer

pytest.importorskip("typer", reason="needs typer, which the package requires; install it with pip")
from typer.testing import CliRunner

NEEDS_MATPLOTLIB = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib; run `nox -s transformers`"
)


def report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def train(folder: Path, rate: float, *callbacks: Any, frozen: bool = False, **options: Any) -> Path:
    model = FAMILIES["qwen3_moe"].build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and "gate." in name))
    apply_densemixer(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=4).tolist()]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        optim="sgd",
        learning_rate=rate,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()
    return folder


def test_every_metric_has_a_title() -> None:
    known = {value for name, value in vars(names).items() if name.isupper() and name not in ("PREFIX", "TITLES")}
    assert known == TITLES.keys()


@NEEDS_MATPLOTLIB
def test_a_run_in_which_it_works(tmp_path: Path) -> None:
    # The state is that of the newest checkpoint alone.
    train(tmp_path / "run", 0.5, DenseMixerCallback(), save_strategy="steps", save_steps=1, save_only_model=True)
    done = report(tmp_path / "run", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("DenseMixer is at work: ")
    assert (tmp_path / "out" / "densemixer.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "densemixer.html").read_text()
    assert "DenseMixer is at work: " in page
    assert "data:image/png;base64," in page
    assert "checkpoint-2/trainer_state.json" in page


@NEEDS_MATPLOTLIB
def test_a_run_in_which_nothing_happens_yet(tmp_path: Path) -> None:
    train(tmp_path, 1e-9, DenseMixerCallback(), save_strategy="steps", save_steps=2, save_only_model=True)
    done = report(tmp_path)
    assert done.exit_code == 0, done.output
    assert "0.0 % of the routers' choices changed since the start, after 2 steps: below 100, that is too" in done.output
    assert 'class="unknown"' in (tmp_path / "densemixer.html").read_text()


@NEEDS_MATPLOTLIB
def test_a_run_whose_routers_are_all_frozen(tmp_path: Path) -> None:
    """Their choices change, since what they read does; DenseMixer has no part in that."""
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=2, save_only_model=True)
    train(tmp_path, 5.0, DenseMixerCallback(), frozen=True, **options)
    (found,) = json.loads(report(tmp_path, "--json").output)
    assert found["last"]["routing_change"] > 0.01
    assert found["works"] is False
    assert found["verdict"] == "no gradient reaches the routers: DenseMixer is doing nothing here"
    assert found["curves"]["router_grad_norm"] == [[1, 0.0], [2, 0.0]]


def test_as_json(tmp_path: Path) -> None:
    train(tmp_path, 0.5, DenseMixerCallback(), save_strategy="steps", save_steps=2, save_only_model=True)
    (found,) = json.loads(report(tmp_path, "--json").output)
    assert found["works"]
    assert found["name"] == ""
    assert [step for step, _ in found["curves"]["router_grad_norm"]] == [1, 2]
    assert found["layers"]["router_grad_norm"].keys() == {"layer_0", "layer_1"}
    assert found["last"]["router_grad_norm"] == found["curves"]["router_grad_norm"][-1][1]
    assert not list(tmp_path.glob("densemixer*"))


def test_a_run_without_metrics_says_how_to_switch_them_on(tmp_path: Path) -> None:
    train(tmp_path, 0.5, save_strategy="steps", save_steps=2, save_only_model=True)
    done = report(tmp_path)
    assert done.exit_code == 1
    assert "densemixer: {metrics: true}" in done.output


@pytest.mark.parametrize(
    "content", [None, "", "no JSON", '{"log_history": [{"loss": 1}]}', "[]", "7", '{"log_history": {}}', "[" * 100_000]
)
def test_what_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    done = report(tmp_path)
    assert done.exit_code == 2
    assert str(tmp_path) in done.output
    assert len(done.output.splitlines()) == 1


def rows(*changes: float, role: str = "", share: float = 0.3) -> list[dict[str, Any]]:
    """A row for each step, from 1 on."""
    names = (f"{role}densemixer/routing_change", f"{role}densemixer/router_grad_share_unselected")
    return [{"step": step, **dict(zip(names, (change, share), strict=True))} for step, change in enumerate(changes, 1)]


def write_state(folder: Path, *changes: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows(*changes)}))
    return folder / "trainer_state.json"


def write_verl(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def verl_rows(*changes: float, role: str = "actor/") -> list[dict[str, Any]]:
    return [{"step": row.pop("step"), "data": row} for row in rows(*changes, role=role)]


def test_verls_file_has_roles(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1}\n')  # of LLaMA-Factory: not this one
    lines = [
        {
            "step": step,
            "data": {
                "actor/densemixer/routing_change": 0.00003 * step,
                "actor/densemixer/layer_3/routing_change": 0.0,
                "critic/densemixer/router_grad_share_unselected": 0.3,
                "critic/grad_norm": 1.0,
            },
        }
        for step in (1, 200)
    ]
    write_verl(tmp_path / "run.jsonl", *lines)
    actor, critic = json.loads(report(tmp_path, "--json").output)
    assert (actor["name"], actor["works"], critic["name"], critic["works"]) == ("actor", False, "critic", True)
    assert actor["verdict"].startswith(
        "0.6 % of the routers' choices changed since the start: DenseMixer is doing nothing"
    )
    assert actor["layers"] == {"routing_change": {"layer_3": [[1, 0.0], [200, 0.0]]}}


def test_the_checkpoint_with_the_most_steps_counts(tmp_path: Path) -> None:
    """Not the one that was touched last, nor the one whose name comes last."""
    for steps in (1000, 200, 30):
        write_state(tmp_path / f"checkpoint-{steps}", *[0.5] * (steps // 10))
    write_state(tmp_path / "checkpoint-best", 0.5)
    (found,) = json.loads(report(tmp_path, "--json").output)
    assert found["source"] == str(tmp_path / "checkpoint-1000" / "trainer_state.json")


def test_a_run_that_was_resumed_with_metrics(tmp_path: Path) -> None:
    """Steps without them are no steps in which nothing happened."""
    before = [{"step": step, "loss": 1.0} for step in range(1, 1001)]
    after = [{**row, "step": 1000 + row["step"]} for row in rows(*[0.002] * 5)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": before + after}))
    (found,) = json.loads(report(tmp_path, "--json").output)
    assert found["works"] is None
    assert "after 5 steps" in found["verdict"]


@pytest.mark.parametrize("same_run", [True, False])
def test_a_run_that_went_on_and_did_not_end(same_run: bool, tmp_path: Path) -> None:
    """The state beside its checkpoints is that of the training before; or of another one, which counts."""
    ended = write_state(tmp_path, *[0.5] * 10)
    going_on = write_state(tmp_path / "checkpoint-20", *[0.5 if same_run else 0.4] * 20)
    write_state(tmp_path / "checkpoint-10", *[0.5] * 10)
    (found,) = json.loads(report(tmp_path, "--json").output)
    assert found["source"] == str(going_on if same_run else ended)


def test_the_log_of_verl_with_the_most_steps_counts(tmp_path: Path) -> None:
    write_verl(tmp_path / "a.jsonl", *verl_rows(*[0.5] * 20))
    write_verl(tmp_path / "b.jsonl", *verl_rows(0.5))
    assert json.loads(report(tmp_path, "--json").output)[0]["source"] == str(tmp_path / "a.jsonl")


OBSTACLES = ("a pipe", "a folder", "a dangling link", "a link to itself", "a broken file", "a link to a device")


def obstruct(path: Path, kind: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a broken file":
        path.write_bytes(b'{"step": 1, "data": \xff')
    else:
        path.symlink_to({"a dangling link": "nowhere", "a link to itself": path.name}.get(kind, "/dev/zero"))


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_is_no_log_hides_none(kind: str, tmp_path: Path) -> None:
    """And nothing waits for it."""
    write_state(tmp_path / "checkpoint-7", 0.5)
    obstruct(tmp_path / "checkpoint-9" / "trainer_state.json", kind)
    obstruct(tmp_path / "trainer_state.json", kind)
    done = report(tmp_path, "--json")
    (found,) = json.loads(done.stdout)
    assert found["source"] == str(tmp_path / "checkpoint-7" / "trainer_state.json")
    assert f"left out: {tmp_path / 'trainer_state.json'}: no " in done.stderr

    (tmp_path / "verl").mkdir()
    write_verl(tmp_path / "verl" / "run.jsonl", *verl_rows(0.5))
    for name in ("a.jsonl", "z.jsonl", "trainer_state.json"):
        obstruct(tmp_path / "verl" / name, kind)
    (found,) = json.loads(report(tmp_path / "verl", "--json").stdout)
    assert found["source"] == str(tmp_path / "verl" / "run.jsonl")


@pytest.mark.parametrize("kind", [kind for kind in OBSTACLES if kind != "a folder"])
def test_a_log_that_is_none(kind: str, tmp_path: Path) -> None:
    obstruct(tmp_path / "log.jsonl", kind)
    done = report(tmp_path / "log.jsonl")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"densemixer report: {tmp_path / 'log.jsonl'}: no " in done.stderr


BROKEN = (
    '{"step": 3, "data"',
    '{"step": 3, "data": [1]}',
    '{"step": 3, "data": "text"}',
    '{"step": 3, "data": null}',
    '{"step": "3", "data": {"actor/densemixer/routing_change": 1}}',
    '{"step": 1e400, "data": {"actor/densemixer/routing_change": 1}}',
    '{"step": 1' + "0" * 400 + ', "data": {"actor/densemixer/routing_change": 1}}',
    '{"step": 3, "data": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "[]",
    "7",
)


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("place", [0, 2])
def test_a_broken_row_hides_no_other(line: str, place: int, tmp_path: Path) -> None:
    lines: list[Any] = [*verl_rows(0.25, 0.5)]
    lines.insert(place, line)
    log = write_verl(tmp_path / "run.jsonl", *lines)
    done = report(tmp_path, "--json")
    (found,) = json.loads(done.stdout)
    assert found["curves"]["routing_change"] == [[1, 0.25], [2, 0.5]]
    assert f"left out: {log}: 1 rows that neither the HF Trainer nor verl write" in done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "1" + "0" * 400,
        "1" + "0" * 5000,
        "1e308",
        "-1e308",
        '"1"',
        "true",
        "[0.5]",
    ],
)
def test_what_is_no_number_is_no_evidence(value: str, tmp_path: Path) -> None:
    text = json.dumps({"log_history": rows(0.25, 0.5)}).replace("0.5", value).replace("0.3", value)
    (tmp_path / "trainer_state.json").write_text(text)
    done = report(tmp_path, "--json")
    (found,) = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["curves"]["routing_change"] == [[1, 0.25], [2, None]]
    assert found["works"] is None
    assert found["verdict"].startswith("can't say whether DenseMixer is at work: ")
    if importlib.util.find_spec("matplotlib") is not None:
        assert report(tmp_path).exit_code == 0


@NEEDS_MATPLOTLIB
def test_what_others_wrote_reaches_neither_terminal_nor_file_name(tmp_path: Path) -> None:
    names = [
        "\x1b]0;owned\x07",
        "../../up",
        "a b\x00",
        "\u202egnp",
        "\ud800",
        "x" * 5000,
        "<script>",
        "a/b",
        "a-b",
        "A*b",
    ]
    folder = tmp_path / "run\x1b[31m"
    folder.mkdir()
    data = {f"{name}/densemixer/routing_change": 0.5 for name in names}
    data["a/densemixer/\x1b[2J/routing_change"] = 0.5
    write_verl(folder / "log\x1b[31m.jsonl", {"step": 1, "data": data}, "broken")
    done = report(folder)
    assert done.exit_code == 0, done.output
    page = (folder / "densemixer.html").read_text()
    for text in (done.stdout, done.stderr, page):
        assert all(character == "\n" or character.isprintable() for character in text)
    assert "<script>" not in page
    written = sorted(path.name for path in folder.iterdir() if path.suffix == ".png")
    assert len(written) == len(names)
    assert all(re.fullmatch(r"densemixer-[A-Za-z0-9._-]{0,110}\.png", name) for name in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    assert "\x1b" not in report(folder, "--json").output


@NEEDS_MATPLOTLIB
@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard", "pipe"])
def test_links_are_replaced_and_not_followed(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_state(run, 0.5)
    for name in ("densemixer.png", "densemixer.html"):
        victim = tmp_path / f"victim of {name}"
        if kind == "pipe":
            os.mkfifo(run / name)
            continue
        if kind != "dangling":
            victim.write_text("mine")
        if kind == "hard":
            os.link(victim, run / name)
        else:
            (run / name).symlink_to(victim)
    assert report(run).exit_code == 0
    assert (run / "densemixer.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (run / "densemixer.html").read_text()
    assert not any((run / name).is_symlink() for name in ("densemixer.png", "densemixer.html"))
    assert all(path.read_text() == "mine" for path in tmp_path.glob("victim*"))
    assert len(list(tmp_path.glob("victim*"))) == (2 if kind in ("symbolic", "hard") else 0)


@NEEDS_MATPLOTLIB
def test_a_folder_in_the_way(tmp_path: Path) -> None:
    write_state(tmp_path, 0.5)
    (tmp_path / "densemixer.png").mkdir()
    done = report(tmp_path)
    assert done.exit_code == 2
    assert "choose a folder with --output" in done.stderr


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert report(tmp_path / ("x" * 5000)).exit_code == 2


NAMES = (
    st.sampled_from(["densemixer/routing_change", "a/densemixer/router_grad_norm", "step", "log_history"]) | st.text()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
METRICS = st.dictionaries(NAMES, VALUES, max_size=4)
ROWS = st.fixed_dictionaries({"step": st.integers() | VALUES, "data": METRICS | VALUES}) | VALUES


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.lists(ROWS, max_size=5), st.lists(METRICS | VALUES, max_size=5) | VALUES, st.binary(max_size=20))
def test_any_content_is_read_or_refused(lines: list[Any], history: Any, tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "\n".join(map(json.dumps, lines)).encode()
        (folder / "run.jsonl").write_bytes(text + b"\n" + tail)
        (folder / "trainer_state.json").write_bytes(json.dumps({"log_history": history}).encode() + tail)
        for target in (folder, folder / "run.jsonl", folder / "trainer_state.json"):
            done = report(target, "--json")
            assert isinstance(done.exception, SystemExit | None), done.exception
            assert done.exit_code in (0, 1, 2)
            if done.exit_code == 0:
                json.loads(done.stdout, parse_constant=pytest.fail)
            assert all(character == "\n" or character.isprintable() for character in done.output)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"densemixer/routing_change": 0.5}
    (tmp_path / "run.jsonl").write_text(json.dumps({"step": 1, "data": data}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = report(tmp_path)
    assert done.exit_code == 2
    assert "pip install matplotlib" in done.output
    assert "DenseMixer is at work" in done.output
