"""Tables, numbers and plots of gradient quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common.markdown import interval, markdown
from common.significance import Interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality.agreement import Agreement, Floats, agreement, cosine_of_sums, cosines, mean_by_token
from quality.pairs import EFFECTS, SWAP, Pairs, Token, stack

ESTIMATORS = ("densemixer", "centered")
ALL_LAYERS = tuple(f"{name}, all layers" for name in ESTIMATORS)
MEASURED = "measured"
POINTS = 2000  # that a plot shows
COLOURS = {"conventional": "tab:blue", "densemixer": "tab:orange", "centered": "tab:green"}


def numbers(layers: list[list[Token]]) -> dict[str, Any]:
    """All measures, over all layers and for each."""
    everything = {"all": stack([token for layer in layers for token in layer])}
    everything |= {str(place): stack(layer) for place, layer in enumerate(layers)}
    return {
        name: {
            "pairs": pairs.measured[SWAP].size,
            "effects": {
                effect: {
                    "base": {key: value._asdict() for key, value in _base(pairs, effect).items()},
                    **{
                        estimator: {key: value._asdict() for key, value in measures._asdict().items()}
                        for estimator, measures in _agreements(pairs, effect).items()
                    },
                }
                for effect in pairs.measured
            },
            "centered_less_densemixer": {
                effect: {key: value._asdict() for key, value in found.items()}
                for effect, found in _advantages(pairs).items()
            },
        }
        for name, pairs in everything.items()
    } | {"routers": _routers(layers)}


def tables(layers: list[list[Token]]) -> str:
    """The measures over all layers, the main ones for each layer, and the routers' whole gradients."""
    pairs = stack([token for layer in layers for token in layer])
    head = ["Effect", "Estimator", "Cosine", "Rank", "Same sign", "Slope", "Intercept", "R²", "Its favourite"]
    rows, bases = [], []
    for effect in pairs.measured:
        base = _base(pairs, effect)
        shape = {"mean": "+.4f", "best": "+.4f", "falls": ".3f", "size": ".4f"}
        bases.append([effect, *(interval(base[key], spec) for key, spec in shape.items())])
        for estimator, found in _agreements(pairs, effect).items():
            shares = [interval(value, ".3f") for value in (found.cosine, found.rank, found.sign, found.slope)]
            nats = [interval(value, "+.4f") for value in (found.intercept, found.favourite)]
            rows.append([effect, estimator, *shares, nats[0], interval(found.r_squared, ".3f"), nats[1]])
    advantages = [
        [effect, *(interval(value, "+.3f") for value in found.values())] for effect, found in _advantages(pairs).items()
    ]
    by_layer = []
    for place, layer in enumerate(layers):
        one = stack(layer)
        for effect in (EFFECTS[1.0], SWAP):
            for estimator, found in _agreements(one, effect).items():
                cells = [interval(v, ".3f") for v in (found.cosine, found.sign, found.slope, found.r_squared)]
                by_layer.append([str(place), effect, estimator, *cells])
    routers = [
        [place, estimator, interval(Interval(**found["token"]), ".3f"), interval(Interval(**found["sum"]), ".3f")]
        for place, estimators in _routers(layers).items()
        for estimator, found in estimators.items()
    ]
    return "\n\n".join(
        [
            f"Over all layers: {len(pairs.sequences)} tokens of {len(set(pairs.sequences))} sequences, "
            f"{pairs.measured[SWAP].size} pairs of a token and an unselected expert",
            markdown(head, rows),
            "What `centered` has more than `densemixer`, paired by token",
            markdown(["Effect", "Cosine", "Same sign"], advantages),
            "What there is to predict: the change of the loss, in nats",
            markdown(["Effect", "Mean over experts", "Best expert of a token", "Share below 0", "Mean size"], bases),
            "By layer",
            markdown(["Layer", "Effect", "Estimator", "Cosine", "Same sign", "Slope", "R²"], by_layer),
            "The whole gradient of the router, against the one with measured changes for unselected experts: cosine of "
            "the gradient of a token's logits, and of the gradient of the router's weight, summed over all tokens",
            markdown(["Layer", "Estimator", "Logits of a token", "Router's weight"], routers),
        ]
    )


def draw(layers: list[list[Token]], path: Path) -> None:
    """Measured against predicted changes, with the lines of calibration, and how agreement falls with the step."""
    pairs = stack([token for layer in layers for token in layer])
    figure = Figure(figsize=(11, 7), layout="constrained")
    (first, second, third), (fourth, fifth, sixth) = figure.subplots(2, 3)
    for effect, axes in ((EFFECTS[1.0], (first, second)), (SWAP, (fourth, fifth))):
        for estimator, place in zip(ESTIMATORS, axes, strict=True):
            _scatter(place, pairs, effect, estimator)
    _bars(third, pairs, "cosine", "Cosine, mean over tokens")
    _bars(sixth, pairs, "r_squared", "R² over all pairs")
    figure.savefig(path, dpi=80)


def _scatter(axes: Axes, pairs: Pairs, effect: str, estimator: str) -> None:
    """Symmetric logarithmic axes: sizes span orders of magnitude, with both signs."""
    x, y = pairs.predicted[effect][estimator].flatten(), pairs.measured[effect].flatten()
    small = float(np.median(np.abs(y)))
    far = float(max(np.abs(x).max(), np.abs(y).max()))
    some = np.random.default_rng(0).permutation(len(x))[:POINTS]
    axes.scatter(x[some], y[some], s=3, alpha=0.3, color=COLOURS[estimator], linewidths=0)
    line = np.concatenate([-np.geomspace(far, small / 10, 200), np.geomspace(small / 10, far, 200)])
    axes.plot(line, line, color="black", linewidth=0.8, label="measured = predicted")
    axes.axhline(0, color="black", linewidth=0.4)
    axes.axvline(0, color="black", linewidth=0.4)
    for set_scale, set_limits in ((axes.set_xscale, axes.set_xlim), (axes.set_yscale, axes.set_ylim)):
        set_scale("symlog", linthresh=small)
        set_limits(-far, far)
    axes.set(title=f"{effect}: {estimator}", xlabel="predicted change, nats", ylabel="measured change, nats")
    axes.tick_params(labelsize=7)
    axes.legend(fontsize="small")


def _bars(axes: Axes, pairs: Pairs, measure: str, title: str) -> None:
    effects = list(pairs.measured)
    for place, estimator in enumerate(ESTIMATORS):
        found = [getattr(_agreements(pairs, effect)[estimator], measure) for effect in effects]
        means = [value.mean for value in found]
        errors = [[v.mean - v.low for v in found], [v.high - v.mean for v in found]]
        x = np.arange(len(effects)) + 0.4 * (place - 0.5)
        axes.bar(x, means, 0.38, yerr=errors, capsize=3, color=COLOURS[estimator], label=estimator)
    axes.set_xticks(range(len(effects)), effects, fontsize="small")
    axes.set(title=title)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()


def _agreements(pairs: Pairs, effect: str) -> dict[str, Agreement]:
    """By estimator. Of an expert that is added, the conventional one predicts nothing."""
    names = (*ESTIMATORS, *ALL_LAYERS) if effect in EFFECTS.values() else ("conventional", *ESTIMATORS, *ALL_LAYERS)
    return {name: agreement(pairs.predicted[effect][name], pairs.measured[effect], pairs.sequences) for name in names}


def _advantages(pairs: Pairs) -> dict[str, dict[str, Interval]]:
    """For each effect, how much more of the cosine and of the signs `centered` has than `densemixer`, by token."""
    found = {}
    for effect, measured in pairs.measured.items():
        one, other = (pairs.predicted[effect][name] for name in reversed(ESTIMATORS))
        signs = [(np.sign(predicted) == np.sign(measured)).mean(1) for predicted in (one, other)]
        found[effect] = {
            "cosine": mean_by_token(cosines(one, measured) - cosines(other, measured), pairs.sequences),
            "sign": mean_by_token(signs[0] - signs[1], pairs.sequences),
        }
    return found


def _base(pairs: Pairs, effect: str) -> dict[str, Interval]:
    """The mean change, that of a token's best expert, the share of changes below zero, and the mean size."""
    measured = pairs.measured[effect]
    values = {
        "mean": measured.mean(1),
        "best": measured.min(1),
        "falls": (measured < 0).mean(1),
        "size": np.abs(measured).mean(1),
    }
    return {name: mean_by_token(value, pairs.sequences) for name, value in values.items()}


def _routers(layers: list[list[Token]]) -> dict[str, Any]:
    """Cosines of whole router gradients with the measured one, by layer and estimator."""
    found: dict[str, Any] = {}
    for place, layer in enumerate(layers):
        pairs = stack(layer)
        found[str(place)] = {}
        for name in ("conventional", *ESTIMATORS, *ALL_LAYERS):
            by_token = mean_by_token(cosines(pairs.logits[name], pairs.logits[MEASURED]), pairs.sequences)
            whole = cosine_of_sums(_weight_gradients(pairs, name), _weight_gradients(pairs, MEASURED))
            found[str(place)][name] = {"token": by_token._asdict(), "sum": whole._asdict()}
    return found


def _weight_gradients(pairs: Pairs, name: str) -> Floats:
    """The gradient of the router's weight from each sequence, [sequences, experts · hidden]."""
    by_token = np.einsum("te,th->teh", pairs.logits[name], pairs.x).reshape(len(pairs.x), -1)
    return np.stack([by_token[pairs.sequences == sequence].sum(0) for sequence in np.unique(pairs.sequences)])
