import pytest
import torch

from densemixer_core import RoutingMismatchError, check_routing, router_scores, selection
from densemixer_core.routing import are_probabilities


def route(score: str, renormalised: bool, scaling: float = 1.0, dtype: torch.dtype = torch.float32, k: int = 3):
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    z = logits.float()
    scores = {"softmax": z.softmax(-1), "sigmoid": z.sigmoid(), "sqrtsoftplus": (1 + z.exp()).log().sqrt()}[score]
    top, index = scores.topk(k, -1)
    weights = (top / top.sum(-1, keepdim=True) if renormalised else top) * scaling
    return logits, index, weights.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_the_factor_turns_scores_into_weights(score: str, renormalised: bool, dtype: torch.dtype) -> None:
    logits, index, weights = route(score, renormalised, scaling=2.5, dtype=dtype)
    scores = router_scores(logits, score)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    c = selection(scores, index, weights, renormalised).factor
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close((c * scores).gather(1, index), weights.to(scores.dtype), rtol=tolerance, atol=tolerance)
    check_routing(scores, index, weights, renormalised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_score_function_is_seen(dtype: torch.dtype) -> None:
    logits, index, weights = route("sigmoid", renormalised=True, dtype=dtype)
    with pytest.raises(RoutingMismatchError, match="not proportional"):
        check_routing(router_scores(logits, "softmax"), index, weights, renormalised=True)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("renormalised", [True, False])
def test_wrong_renormalisation_is_seen_even_for_top_1(renormalised: bool, k: int) -> None:
    logits, index, weights = route("softmax", renormalised, k=k)
    with pytest.raises(RoutingMismatchError, match="differs between tokens"):
        check_routing(router_scores(logits, "softmax"), index, weights, not renormalised)


def test_no_tokens_is_no_mismatch() -> None:
    empty = torch.empty(0, 8)
    check_routing(empty, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), renormalised=True)


def test_unknown_score_function() -> None:
    with pytest.raises(ValueError, match="softmax, sigmoid, sqrtsoftplus; got 'tanh'"):
        router_scores(torch.zeros(1, 2), "tanh")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_and_probabilities_are_told_apart(dtype: torch.dtype) -> None:
    logits = torch.randn(50, 128, dtype=torch.float64)
    assert not are_probabilities(logits.to(dtype))
    assert not are_probabilities(logits.sigmoid().to(dtype))
    assert not are_probabilities(torch.zeros(50, 128, dtype=dtype))
    assert are_probabilities(logits.softmax(-1).to(dtype))
