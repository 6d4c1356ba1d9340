"""What ``densemixer preflight`` found, as tables, JSON, a picture and a page."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from densemixer_adapters.cli.columns import columns
from densemixer_adapters.cli.page import Section, Table, page, replace
from densemixer_adapters.cli.printable import printable
from densemixer_adapters.cli.report import or_none
from densemixer_adapters.preflight import Preflight
from densemixer_adapters.preflight.edge import PERCENTILES
from densemixer_adapters.preflight.verdict import main_estimator

ESTIMATORS = ("gradient", "cosine of\nhalves", "signal = noise,\ntokens a step", "choices\nchanged", "updates\nlost")
LAYERS = (
    "layer",
    "margin,\n5 %",
    "\n50 %",
    "reach\nat most",
    "\nby noise",
    "choices changed\nat most",
    "\nby noise",
    "\nby {name}",
    "cosine of\nhalves",
    "gain, nats a token:\nbest swap",
    "\nnext in line",
)
COLOURS = {"conventional": "tab:blue", "densemixer": "tab:orange", "centered": "tab:green"}


def tables(found: Preflight) -> str:
    """For a terminal."""
    about = (
        f"Looked at {found.batches} batches of {found.tokens:.0f} tokens, for {found.steps} steps at a learning rate "
        f"of {found.learning_rate:g}; routers in {found.dtype}. Margins and reach are in logits; gains are hindsight, "
        "to first order (docs/preflight.md)."
    )
    estimators, layers = _tables(found)
    return f"{columns(estimators.rows, estimators.heads)}\n\n{columns(layers.rows, layers.heads)}\n\n{about}"


def _tables(found: Preflight) -> tuple[Table, Table]:
    rows = [
        (
            name,
            f"{one.agreement.whole:.2f}",
            "more than known" if math.isinf(one.noise_tokens) else f"{one.noise_tokens:.2g}",
            _percent(one.change.whole),
            _percent(one.lost.whole),
        )
        for name, one in found.estimators.items()
    ]
    name = main_estimator(found.estimators)
    main = found.estimators[name]
    shares = (found.at_most, found.by_noise, main.change)
    gains = (found.best_swap, found.next_swap)
    layers = [
        (
            layer,
            *(_number(found.margins[position][PERCENTILES.index(percentile)]) for percentile in (5, 50)),
            *map(_number, found.reach[position]),
            *(_percent(share.layers[position]) for share in shares),
            _number(main.agreement.layers[position]),
            *(_number(gain.layers[position]) for gain in gains),
        )
        for position, layer in enumerate(found.layers)
    ]
    whole = [*(_percent(share.whole) for share in shares), _number(main.agreement.whole)]
    layers.append(("all", "", "", "", "", *whole, *(_number(gain.whole) for gain in gains)))
    return Table(ESTIMATORS, rows), Table([head.format(name=name) for head in LAYERS], layers)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def as_json(found: Preflight) -> str:
    """All of it; ``null`` is what isn't known, or has no bound."""
    return json.dumps(_plain(found), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return or_none(value)
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def write(found: Preflight, folder: Path, source: str) -> list[Path]:
    """Write preflight.png, and preflight.html with the numbers.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: A file can't be written.
    """
    picture = _draw(found)
    folder.mkdir(parents=True, exist_ok=True)
    note = "Lines are over the layers, in their order. Black bands: 5, 25, 50, 75 and 95 % of the tokens. From "
    section = Section("Routers", found.verdict, picture, _tables(found), f"{note}{printable(source)}.")
    written = page("DenseMixer: a look before training", [section])
    return [replace(folder / "preflight.png", picture), replace(folder / "preflight.html", written)]


def _draw(found: Preflight) -> bytes:
    from matplotlib.figure import Figure  # no pyplot: it would choose a display

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (margins, changes), (cosines, gains) = figure.subplots(2, 2)
    low, lower, median, upper, high = zip(*found.margins, strict=True)
    layers = range(len(found.layers))
    margins.fill_between(layers, low, high, color="black", alpha=0.12, linewidth=0)
    margins.fill_between(layers, lower, upper, color="black", alpha=0.2, linewidth=0)
    _line(margins, median, "black", "margin")
    for values, colour, label in zip(
        zip(*found.reach, strict=True), ("tab:red", "tab:gray"), ("reach at most", "reach by noise"), strict=True
    ):
        _line(margins, values, colour, label)
    _line(changes, found.at_most.layers, "tab:red", "at most")
    _line(changes, found.by_noise.layers, "tab:gray", "by noise")
    for name, one in found.estimators.items():
        _line(changes, one.change.layers, COLOURS[name], name)
        _line(cosines, one.agreement.layers, COLOURS[name], name)
    _line(gains, found.best_swap.layers, "black", "best swap")
    _line(gains, found.next_swap.layers, "tab:gray", "next in line")
    titles = {
        margins: "margin at the edge of the selection, logits",
        changes: f"choices changed by {found.steps} steps at {found.learning_rate:g}, share",
        cosines: "cosine of the routers' gradients of two halves",
        gains: "gain of swaps in hindsight, first order, nats a token",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    margins.set_yscale("log")
    changes.set_yscale("symlog", linthresh=0.001)
    changes.set_ylim(bottom=0)
    gains.set_ylim(bottom=0)
    cosines.axhline(0, color="black", linewidth=0.5)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _line(axes: Any, values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(range(len(values)), values, color=colour, marker=".", linewidth=1.4, label=label)
