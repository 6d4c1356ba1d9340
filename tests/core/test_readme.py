"""What the README says about options and cost is what the code says."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

from densemixer_core import DenseMixerConfig
from densemixer_core.estimators import ESTIMATORS

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_option_and_estimator_is_in_its_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", README, flags=re.MULTILINE)
    defaults = {field.name: f"`{field.default!r}`".replace("'", '"') for field in dataclasses.fields(DenseMixerConfig)}
    assert defaults.items() <= dict(rows).items()
    assert set(ESTIMATORS) <= dict(rows).keys()


def test_the_cost_is_what_its_formula_prints() -> None:
    ((program, printed),) = re.findall(r"```python\n(hidden, .*?)```\n\n```text\n(.*?)```", README, flags=re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(program, {})
    assert output.getvalue() == printed
