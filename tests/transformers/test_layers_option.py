"""The option `layers`: what it accepts, what it selects, and what it says when the model has no such layer."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer
from densemixer_core import DenseMixerConfig

BOUND = st.none() | st.integers(-12, 12)


def model(layers: int = 3) -> Any:
    """Dense layers in between, so that positions among MoE layers and among all layers differ."""
    dense = list(range(0, 2 * layers, 2))
    return tiny_models.qwen3_moe(num_hidden_layers=2 * layers, mlp_only_layers=dense)


@given(count=st.integers(1, 8), positions=st.lists(st.integers(-12, 12), min_size=1))
def test_positions_are_those_of_python(count: int, positions: list[int]) -> None:
    config = DenseMixerConfig(layers=positions)
    layers = list(range(count))
    try:
        expected = sorted({layers[position] for position in positions})
    except IndexError:
        with pytest.raises(ValueError, match=f"the model has {count} Mixture-of-Experts layers"):
            config.positions(count)
    else:
        assert list(config.positions(count)) == expected


@given(count=st.integers(1, 8), start=BOUND, stop=BOUND, step=st.none() | st.sampled_from([-2, -1, 1, 2, 3]))
def test_slices_are_those_of_python_within_the_model(
    count: int, start: int | None, stop: int | None, step: int | None
) -> None:
    text = ":".join("" if bound is None else str(bound) for bound in (start, stop, step))
    config = DenseMixerConfig(layers=text)
    expected = list(range(count))[start:stop:step]
    beyond = any(bound is not None and abs(bound) > count for bound in (start, stop))
    if beyond or not expected:
        with pytest.raises(ValueError, match=f"{count} Mixture-of-Experts layers, this (goes beyond|selects none)"):
            config.positions(count)
    else:
        assert list(config.positions(count)) == sorted(expected)


def test_all_layers_by_default() -> None:
    assert list(DenseMixerConfig().positions(3)) == [0, 1, 2]


def test_a_list_as_text_for_the_environment() -> None:
    for text, expected in (("0, 2,-1", (0, 2, -1)), ("-2:", "-2:"), ("5", (5,))):
        assert DenseMixerConfig.from_environment({"DENSEMIXER_LAYERS": text}).layers == expected
    with pytest.raises(ValueError, match="DENSEMIXER_LAYERS"):
        DenseMixerConfig.from_environment({"DENSEMIXER_LAYERS": "first"})


@pytest.mark.parametrize("layers", ["", "1:2:3:4", "::0", "a:b", "0;1", []])
def test_bad_values(layers: object) -> None:
    with pytest.raises(ValueError, match="layers must be"):
        DenseMixerConfig.from_dict({"layers": layers})


@pytest.mark.parametrize("layers", [3, True, 1.5, [0, "1"], [True], [0.0], {0: 1}])
def test_bad_types(layers: object) -> None:
    with pytest.raises(TypeError, match="layers must be"):
        DenseMixerConfig.from_dict({"layers": layers})


def test_the_options_stay_hashable_and_equal() -> None:
    assert len({DenseMixerConfig(layers=[0, 1]), DenseMixerConfig(layers=(0, 1)), DenseMixerConfig(layers="0,1")}) == 1


def test_only_the_chosen_layers_are_attached() -> None:
    with apply_densemixer(model(), DenseMixerConfig(layers="-2:")) as handle:
        assert [layer.name for layer in handle.layers] == ["model.layers.3.mlp", "model.layers.5.mlp"]


def test_only_the_chosen_layers_learn_from_all_experts() -> None:
    tokens = torch.arange(8)[None]

    def router_gradients(config: DenseMixerConfig | None) -> list[torch.Tensor]:
        host = model()
        if config is not None:
            apply_densemixer(host, config)
        host(input_ids=tokens, labels=tokens).loss.backward()
        return [host.model.layers[i].mlp.gate.weight.grad for i in (1, 3, 5)]

    conventional, chosen = router_gradients(None), router_gradients(DenseMixerConfig(layers=[-1]))
    assert not torch.allclose(chosen[2], conventional[2])
    # The last layer's router takes its input from the others, so theirs may change; nothing else may be attached.
    everywhere = router_gradients(DenseMixerConfig())
    assert not torch.allclose(chosen[0], everywhere[0])


def test_a_layer_that_the_model_lacks_is_an_error_that_names_the_count() -> None:
    with pytest.raises(ValueError, match="the model has 3 Mixture-of-Experts layers"):
        apply_densemixer(model(), DenseMixerConfig(layers=[3]))


def test_a_model_without_layers_is_still_that_error() -> None:
    with pytest.raises(UnsupportedModelError, match="has no Mixture-of-Experts layers"):
        apply_densemixer(torch.nn.Linear(2, 2), DenseMixerConfig(layers=[3]))
