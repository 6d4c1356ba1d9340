"""``densemixer preflight``: what it takes, and how it loads a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from densemixer_adapters.cli.printable import say
from densemixer_adapters.cli.reading import not_a_folder, reading

if TYPE_CHECKING:
    from densemixer_adapters.preflight import Preflight

DTYPES = ("float32", "bfloat16", "float16")


def preflight(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="PATH_OR_ID", help="Folder of a checkpoint or of a LoRA adapter, or an id on the hub."),
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A .txt file, or .jsonl with `text` or `messages` in each line.")
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that the training is to have.")] = 1000,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Of each step, for the routers; where it falls, the mean.")
    ] = 1e-5,
    length: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a sequence.")] = 512,
    sequences: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences of a step.")] = 4,
    count: Annotated[
        int, typer.Option("--batches", min=2, help="Steps' worth of data to look at, an even number.")
    ] = 8,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help=f"Of the weights that the optimizer steps: {', '.join(DTYPES)}; the checkpoint's."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Where to run it; a GPU if there is one.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for preflight.png and preflight.html; none if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print verdict and numbers as JSON.")] = False,
) -> None:
    """Look before training: would it move the routing of a model, and by a signal or by noise?

    Reads the model and a few batches of the data, and trains nothing. It says how far the experts' scores are apart
    where the selection ends and how many choices the steps would change, how many of the routers' updates rounding
    swallows, how far the routers' gradients of two halves of the data agree, and what the best changes of the routing
    would gain. Not whether the model becomes better. The exit status is 1 if the model isn't supported, 2 if model or
    data can't be used or nothing be written, whatever the verdict.
    """
    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
    if count % 2:
        raise typer.BadParameter(f"halves of the batches are compared: --batches must be even, got {count}")
    if not 0 < learning_rate < 1:
        raise typer.BadParameter(f"--learning-rate must be above 0 and below 1, got {learning_rate}")
    from densemixer_adapters.errors import UnsupportedModelError

    if output is not None:
        _try_to_write(output)
    try:
        found = _look(checkpoint, data, steps, learning_rate, length, sequences, count, dtype, device)
    except UnsupportedModelError as error:
        say(f"densemixer preflight: {error}", err=True)
        raise typer.Exit(1) from None
    from densemixer_adapters.cli.preflight_report import as_json as to_json
    from densemixer_adapters.cli.preflight_report import tables, write

    if as_json:
        typer.echo(to_json(found))
    else:
        say(found.verdict.text)
        typer.echo(f"\n{tables(found)}")
    if output is None:
        return
    try:
        written = write(found, output, f"{checkpoint} and {data}")
    except OSError as error:
        _end(f"can't write: {error}; choose a folder with --output")
    say("", f"Wrote {' and '.join(map(str, written))}.", err=as_json)


def _try_to_write(folder: Path) -> None:
    """Before a model is loaded for what can't be drawn, or kept."""
    if importlib.util.find_spec("matplotlib") is None:
        _end("drawing needs matplotlib: pip install matplotlib")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _end(f"can't write: {error}; choose a folder with --output")


def _end(why: str) -> NoReturn:
    say(f"densemixer preflight: {why}", err=True)
    raise typer.Exit(2) from None


def _look(
    checkpoint: str,
    data: Path,
    steps: int,
    learning_rate: float,
    length: int,
    sequences: int,
    count: int,
    dtype: str | None,
    device: str | None,
) -> Preflight:
    """What costs little comes first: the configuration, the tokenizer and the data."""
    import torch

    from densemixer_adapters.cli.inspection import build_empty, inspect_model
    from densemixer_adapters.cli.texts import UnusableDataError, batches_of
    from densemixer_adapters.errors import UnsupportedModelError
    from densemixer_adapters.preflight import preflight as look

    with reading(f"the adapter in {checkpoint}"):
        base = _base_of(checkpoint)
    with reading(f"the configuration of {base}", not_a_folder(base)):
        report = inspect_model(build_empty(base))
    if not report.supported:
        raise UnsupportedModelError(report.reason)
    with reading(f"the tokenizer of {base}", "; save it there with tokenizer.save_pretrained"):
        tokenizer = _tokenizer(base)
    try:
        batches = batches_of(data, tokenizer, count, sequences, length)
    except UnusableDataError as error:
        _end(str(error))
    if base != checkpoint and importlib.util.find_spec("peft") is None:
        _end(f"the adapter in {checkpoint} needs peft: pip install peft")
    where = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with reading(f"the device {where}", "; choose another with --device"):
        torch.empty(0, device=where)
    with reading(f"the model of {checkpoint}"):
        model = _model(base, None if base == checkpoint else checkpoint, dtype).to(where)
        batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
        return look(model, batches, steps=steps, learning_rate=learning_rate)


def _base_of(checkpoint: str) -> str:
    """The model that an adapter of PEFT is for; what isn't one is a model itself."""
    config = Path(checkpoint) / "adapter_config.json"
    if not config.is_file():
        return checkpoint
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError("its adapter_config.json names no base model")
    return base


def _tokenizer(checkpoint: str) -> Any:
    """A tokenizer with a vocabulary.

    Raises:
        ValueError: There are no files of one. Then transformers makes one that knows nothing.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    if {*tokenizer("A text.", add_special_tokens=False)["input_ids"]} <= {*tokenizer.all_special_ids}:
        raise ValueError("there are no files with its vocabulary")
    return tokenizer


def _model(base: str, adapter: str | None, dtype: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto", trust_remote_code=False)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model
