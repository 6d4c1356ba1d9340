"""What one step's extra gradient is worth at a budget, as measured: `docs/budget.md` has the table and its command."""

from __future__ import annotations

ESTIMATORS = ("densemixer", "centered")

MEASURED = {
    1 / 8: ("0.81 to 0.99", "0.86 to 1.00"),
    1 / 16: ("0.59 to 0.96", "0.76 to 0.99"),
    1 / 32: ("0.41 to 0.91", "0.56 to 0.98"),
    1 / 64: ("0.26 to 0.80", "0.35 to 0.94"),
}
"""By budget, for each of `ESTIMATORS`: the least and the greatest of the layers of six small trained models."""

WHAT_COSINES_ARE = (
    "cosine: of the extra gradient of one step of 2048 tokens with the exact one, mean over 24 draws, in the layers\n"
    "of six small models that were trained for 120 steps (docs/budget.md). Yours may differ; more tokens a step\n"
    "help, and so does the mean over steps that an optimizer takes."
)


def cosines(budget: float) -> tuple[str, ...]:
    """A cell for each estimator, empty where nothing was measured."""
    return ("1", "1") if budget == 1 else MEASURED.get(budget, ("", ""))
