"""What the router metrics are called in logs and in reports. Apart from what measures: reading a log needs no torch."""

PREFIX = "densemixer/"
NORM = "router_grad_norm"
SHARE = "router_grad_share_unselected"
COSINE = "router_grad_cosine_conventional"
ENTROPY = "load_entropy"
MAXIMUM = "load_max_over_mean"
CHANGE = "routing_change"
DRIFT = "logit_drift"
LOST = "updates_lost"
LEFT_OUT = "pairs_left_out"

TITLES = {
    NORM: "norm of the routers' gradient",
    SHARE: "share of it from unselected experts",
    COSINE: "cosine with the conventional gradient",
    ENTROPY: "entropy of the experts' load (1: even)",
    MAXIMUM: "load of the busiest expert / mean load",
    CHANGE: "routing changed since the start, share of selections",
    DRIFT: "drift of the logits since the start, relative",
    LOST: "share of updates lost to rounding",
    LEFT_OUT: "pairs of token and expert left out, which overflow",
}
"""The same for people, in the order in which they are shown."""
