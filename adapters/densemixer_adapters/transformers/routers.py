"""What each router of transformers computes, and which layers the method isn't for: declared here and nowhere else.

Routers of a user's own are declared by `register_router`. A declaration is compared with the weights that the model
really uses at the first training forward of each layer, so a wrong line here stops the training; it can't bend it
silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from densemixer_core import router_scores
from densemixer_core.routing import SCORE_FUNCTIONS

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Router:
    """How a router turns logits into the weights of the experts it selects.

    Args:
        score: Name of the score function: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``. Biases, groups and noise
            that act on the selection alone don't matter here.
        renormalised: Whether the scores of the selected experts are divided by their sum: yes, no, or the name of the
            attribute of the router or its block that says so. A softmax over the selected experts' logits is a softmax
            over all that is renormalised.
        expert_scale: Name of the router's parameter that scales each expert's weight, [experts], if it has one.
        further: What the router's outputs beyond the stacked experts stand for: an expert that returns its input, or
            one that returns zero, which the router hands on as another expert with weight 0.
        scored: The name of the router's attribute that says how many outputs it has, those included.
        linear: Whether the logits are the product of the router's input with its `weight`, if it has one, and nothing
            else but a bias. Router metrics read the weight's gradient off that of the logits.
        epsilon: What the layer adds to the sum of the selected scores before it divides by it, or the name of the
            attribute of the router that says so. Where it matters, a wrong one is a mismatch with the layer's weights.
    """

    score: str
    renormalised: bool | str
    expert_scale: str | None = None
    further: Literal["identity", "zero"] | None = None
    scored: str | None = None
    linear: bool = True
    epsilon: float | str = 0.0

    def scores_of(self, output: Tensor, probabilities: bool) -> Tensor:
        """The scores p, [..., experts], from what the router returned: logits, or probabilities."""
        return output if probabilities else router_scores(output, self.score)

    def epsilon_of(self, router: nn.Module) -> float:
        """Read the declaration off the router."""
        return float(getattr(router, self.epsilon)) if isinstance(self.epsilon, str) else self.epsilon

    def missing(self, router: nn.Module, block: nn.Module) -> list[str]:
        """The attributes that the declaration names, and which aren't there."""
        of_router = [(name, (router,)) for name in (self.epsilon, self.expert_scale, self.scored)]
        named: list[tuple[object, tuple[nn.Module, ...]]] = [(self.renormalised, (router, block)), *of_router]
        return [name for name, owners in named if isinstance(name, str) and not any(hasattr(it, name) for it in owners)]

    def is_renormalised(self, owners: Iterable[nn.Module]) -> bool:
        """Read the declaration off the first of ``owners`` (router, block) that has the attribute."""
        if isinstance(self.renormalised, bool):
            return self.renormalised
        for owner in owners:
            if hasattr(owner, self.renormalised):
                return bool(getattr(owner, self.renormalised))
        raise AttributeError(f"neither router nor block has an attribute {self.renormalised!r}")


def _cohere2(router: nn.Module) -> Router:
    if router.expert_selection_fn == "softmax":  # over the selected
        return Router("softmax", True)
    return _SIGMOID_WITHOUT_EPSILON


def _by_activation(router: nn.Module) -> Router:
    name = type(router.score_fn).__name__
    scores = {"Sigmoid": "sigmoid", "Softmax": "softmax", "SqrtSoftplusActivation": "sqrtsoftplus"}
    return Router(scores.get(name, name), True, epsilon=1e-20)


_SOFTMAX = Router("softmax", False)
_SOFTMAX_RENORMALISED = Router("softmax", True)
_SOFTMAX_CONFIGURED = Router("softmax", "norm_topk_prob")
_SIGMOID_RENORMALISED = Router("sigmoid", True)
_SIGMOID_CONFIGURED = Router("sigmoid", "norm_topk_prob", epsilon=1e-20)
_SIGMOID_WITHOUT_EPSILON = Router("sigmoid", "norm_topk_prob")

ROUTERS: dict[str, Router | Callable[[nn.Module], Router]] = {
    "AXK1TopkRouter": _SIGMOID_CONFIGURED,
    "AXK2TopkRouter": _SIGMOID_CONFIGURED,
    "AfmoeTokenChoiceRouter": Router("sigmoid", True, epsilon=1e-20),
    "AriaTextTopKRouter": _SOFTMAX_RENORMALISED,
    "BailingHybridTopkRouter": _SIGMOID_CONFIGURED,
    "BeamTopKRouter": _SIGMOID_CONFIGURED,
    "Cohere2MoeTopKRouter": _cohere2,
    "DeepseekOcr2TextTopkRouter": _SOFTMAX,
    "DeepseekV2TopkRouter": _SOFTMAX,
    "DeepseekV32TopkRouter": _SIGMOID_CONFIGURED,
    "DeepseekV3TopkRouter": _SIGMOID_CONFIGURED,
    "DeepseekV4TopKRouter": _by_activation,
    "DiffusionGemmaTextRouter": Router("softmax", True, expert_scale="per_expert_scale"),
    "Dots1TopkRouter": _SIGMOID_CONFIGURED,
    "Dots3NoteTextTopkRouter": _SIGMOID_CONFIGURED,
    "Dots3NoteVisionTopKRouter": Router("sigmoid", True, epsilon=1e-20),
    "Ernie4_5_MoeTopKRouter": Router("softmax", True, epsilon="norm_min"),
    "Ernie4_5_VLMoeMoeTopKRouter": Router("softmax", True, epsilon="norm_min"),
    "ExaoneMoeTopkRouter": _SIGMOID_CONFIGURED,
    "FlexOlmoTopKRouter": _SOFTMAX_CONFIGURED,
    "FlintTopKRouter": _SIGMOID_WITHOUT_EPSILON,
    "Gemma4TextRouter": Router("softmax", True, expert_scale="per_expert_scale"),
    "Glm4MoeLiteTopkRouter": _SIGMOID_CONFIGURED,
    "Glm4MoeTopkRouter": _SIGMOID_CONFIGURED,
    "Glm4vMoeTextTopkRouter": _SIGMOID_CONFIGURED,
    "Glm5NextTextTopkRouter": _SIGMOID_CONFIGURED,
    "GlmMoeDsaTopkRouter": _SIGMOID_CONFIGURED,
    "GptOssTopKRouter": _SOFTMAX_RENORMALISED,
    "GraniteMoeHybridTopKRouter": _SOFTMAX_RENORMALISED,
    "GraniteMoeSWATopKRouter": _SOFTMAX_RENORMALISED,
    "GraniteMoeSharedTopKRouter": _SOFTMAX_RENORMALISED,
    "GraniteMoeTopKRouter": _SOFTMAX_RENORMALISED,
    "HYV3TopKRouter": Router("sigmoid", True, epsilon=1e-20),
    "HYV4TopkRouter": _SIGMOID_CONFIGURED,
    "HYV4VLTopkRouter": _SIGMOID_CONFIGURED,
    "HunYuanMoEV1Gate": _SOFTMAX_RENORMALISED,
    "Inkling2LoopTopKRouter": _by_activation,
    "Inkling2TopKRouter": _by_activation,
    "JambaSparseMoeBlock": _SOFTMAX,
    "JambaTopKRouter": _SOFTMAX,
    "KimiLinearTopkRouter": _SIGMOID_CONFIGURED,
    "Kolibri1TopKRouter": _SIGMOID_WITHOUT_EPSILON,
    "LagunaTopKRouter": _SIGMOID_RENORMALISED,
    "LaraMiniTopKRouter": _SOFTMAX_CONFIGURED,
    "Lfm2MoeSparseMoeBlock": Router("sigmoid", "norm_topk_prob", epsilon=1e-6),
    "Lfm2MoeTopKRouter": Router("sigmoid", "norm_topk_prob", epsilon=1e-6),
    "LongcatFlashTopkRouter": Router("softmax", False, further="identity", scored="n_routed_experts"),
    "MellumTopKRouter": _SOFTMAX_CONFIGURED,
    "MiMoV2FlashTopkRouter": _SIGMOID_CONFIGURED,
    "MiniMaxM2TopKRouter": _SIGMOID_RENORMALISED,
    "MiniMaxM3VLTopKRouter": _SIGMOID_RENORMALISED,
    "MiniMaxTopKRouter": _SOFTMAX_RENORMALISED,
    "Mistral4TopkRouter": Router("softmax", "norm_topk_prob", epsilon=1e-20),
    "MistralLarge4TextTopkRouter": Router("softmax", True, epsilon=1e-20),
    "MixtralTopKRouter": _SOFTMAX_RENORMALISED,
    "MuseSparkTopkRouter": Router("sigmoid", True, linear=False, epsilon="norm_topk_prob_eps"),  # the product is scaled
    "NemotronHTopkRouter": _SIGMOID_CONFIGURED,
    "OlmoeTopKRouter": _SOFTMAX_CONFIGURED,
    "OpenAIPrivacyFilterTopKRouter": _SOFTMAX_RENORMALISED,
    "Qwen2MoeTopKRouter": _SOFTMAX_CONFIGURED,
    "Qwen3MoeTopKRouter": _SOFTMAX_CONFIGURED,
    "Qwen3NextTopKRouter": _SOFTMAX_CONFIGURED,
    "Qwen3OmniMoeTalkerTextTopKRouter": _SOFTMAX_CONFIGURED,
    "Qwen3OmniMoeThinkerTextTopKRouter": _SOFTMAX_CONFIGURED,
    "Qwen3VLMoeTextTopKRouter": _SOFTMAX_RENORMALISED,
    "Qwen3_5MoeTopKRouter": _SOFTMAX_RENORMALISED,
    "Qwen4ExpTextTopKRouter": _SOFTMAX_CONFIGURED,
    "SolarOpenTopkRouter": _SIGMOID_CONFIGURED,
    "Step3p7TopKRouter": _SIGMOID_RENORMALISED,
    "UnlimitedOcrTextTopkRouter": _SOFTMAX,
    "ZayaRouter": Router("softmax", False, further="zero", scored="num_router_classes"),
}
"""Keyed by the name of the router's class; where that is a plain linear layer, of the block's."""

CONVENTIONAL: dict[str, str] = {
    "DeepseekV4HashRouter": "it picks experts by token id, so an unselected expert's score can't change the selection",
}
"""Routers of layers that train conventionally, as part of a model whose other layers don't, and why."""

_INLINE = "it computes its experts inline, without a module `experts` that DenseMixer could follow"
_SEPARATE = (
    "its experts are separate modules, behind a capacity that drops tokens; DenseMixer reads stacked weights and "
    "follows every token"
)
_OLDER = "; the models of newer versions of transformers are supported"

REFUSED: dict[str, str] = {
    "AriaTextMoELayer": "its experts take logits and select by themselves" + _OLDER,
    "DbrxFFN": "its experts keep gate and up projection in separate weights; DenseMixer reads a stacked `gate_up_proj`",
    "DeepseekV2Moe": "it multiplies by its router's weight instead of calling the router" + _OLDER,
    "DogeCDMoE": "its experts are rows of embeddings, found by product keys and computed inline",
    "GraniteMoeHybridMoE": _INLINE + _OLDER,
    "GraniteMoeMoE": _INLINE + _OLDER,
    "GraniteMoeSharedMoE": _INLINE + _OLDER,
    "InklingMoE": "its weights are normalised together with those of its shared experts, outside of `experts`",
    "JetMoeMoA": "its experts are projections around the attention, so its output isn't their weighted sum",
    "JetMoeMoE": _INLINE,
    "Llama4TextMoe": "it scales the experts' input by the score, so its output isn't linear in the weights",
    "NllbMoeSparseMLP": _SEPARATE,
    "PhimoeSparseMoeBlock": "its SparseMixer router estimates a gradient of its own for the selection",
    "SwitchTransformersSparseMLP": _SEPARATE,
}
"""Blocks that DenseMixer can't train, by the name of their class, and why; unless their router is in `ROUTERS`."""


_REGISTERED: dict[str, Router] = {}

_KINDS: dict[str, tuple[type, ...]] = {
    "renormalised": (bool, str),
    "epsilon": (float, int, str),
    "expert_scale": (str, type(None)),
    "scored": (str, type(None)),
}
"""What the fields of a declaration may be."""


def register_router(name: str, router: Router) -> None:
    """Say what a router of your own computes, so that DenseMixer trains the models that have it.

    At the first training forward of each layer, and now and then later, it is compared with the weights that the layer
    really uses; a wrong declaration is an error there. Call it before DenseMixer is attached. Registering a name again
    takes the earlier one's place.

    Args:
        name: The name of the router's class; where the router is a plain ``nn.Linear``, of the class of the block that
            owns it. Subclasses go with it.
        router: What it computes.

    Raises:
        TypeError: One of them is of another type.
        ValueError: The score isn't known, or what further outputs stand for, or the class is one of transformers',
            whose declaration is built in.
    """
    if not isinstance(name, str) or not isinstance(router, Router):
        raise TypeError(
            f"register_router: takes the name of the router's class, and a Router; got {name!r} and {router!r}"
        )
    for field, kinds in _KINDS.items():
        if not isinstance(value := getattr(router, field), kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise TypeError(f"register_router: {field} must be {wanted}; got {value!r}")
    if router.score not in SCORE_FUNCTIONS:
        raise ValueError(f"register_router: {router.score!r} is none of the scores {', '.join(SCORE_FUNCTIONS)}")
    if router.further not in (None, "identity", "zero"):
        raise ValueError(f"register_router: further must be 'identity', 'zero' or None; got {router.further!r}")
    if name in ROUTERS or name in CONVENTIONAL:
        raise ValueError(f"register_router: {name} is declared already; give a router of your own a name of its own")
    _REGISTERED[name] = router


def line_to_register(router: nn.Module, block: nn.Module) -> str:
    """What to write for an unknown router, with its name filled in."""
    # A plain projection says nothing, whatever class quantisation or FSDP2 has made of it.
    owner = block if isinstance(router, nn.Linear) else router
    # FSDP2 makes a class of its own of each class that it shards.
    kind = next(kind for kind in type(owner).__mro__ if not issubclass(kind, FSDPModule))
    return f'register_router("{kind.__name__}", Router("softmax", renormalised=True))'


def is_registered(spec: Router) -> bool:
    """Whether it is a user's own declaration."""
    return any(spec is registered for registered in _REGISTERED.values())


def router_of(router: nn.Module, block: nn.Module) -> Router | None:
    """What is declared for a block's router; None if it is unknown.

    Raises:
        LookupError: DenseMixer can't train the block. The message says why.
    """
    known = {**ROUTERS, **_REGISTERED}
    declared = _named(known, router)
    if declared is None:
        if (reason := _named(REFUSED, block)) is not None:
            raise LookupError(reason)
        declared = _named(known, block)
    return declared(router) if callable(declared) else declared


def is_refused(block: nn.Module) -> bool:
    """Whether a block is in `REFUSED`, whatever its router."""
    return _named(REFUSED, block) is not None


def left_to_the_host(router: nn.Module) -> str | None:
    """Why the router's layer trains conventionally; None if it doesn't."""
    return _named(CONVENTIONAL, router)


def _named(table: dict[str, _T], module: nn.Module) -> _T | None:
    return next((table[c.__name__] for c in type(module).__mro__ if c.__name__ in table), None)
