"""Runs the YAMLs of examples/llamafactory with the real ``llamafactory-cli``, once per combination asked for.

Most in a process that is forked from one that has imported LLaMA-Factory, for that takes longer than training: there
the command's own ``main`` runs. On several ranks, and with variables set, it is the installed command.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

from forks import Forks
from installs import REPOSITORY, clean, run
from safetensors.torch import load_file
from torch import Tensor

EXAMPLES = REPOSITORY / "examples" / "llamafactory"
SCRIPTS = Path(sys.executable).parent
SETTINGS = {"PATH": f"{SCRIPTS}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

SGD = ("optim=sgd", "learning_rate=0.1", "lr_scheduler_type=constant", "warmup_ratio=0")
"""Plain SGD at a constant rate: a change of a weight is a sum of gradients, nothing rescales it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run."""

    log: str
    output: Path

    @functools.cached_property
    def losses(self) -> list[float]:
        """Of each step, with all digits."""
        state = json.loads((self.output / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(next(self.output.glob("*model.safetensors")))

    @property
    def files(self) -> set[str]:
        return {str(path.relative_to(self.output)) for path in self.output.rglob("*") if path.is_file()}

    @property
    def attached(self) -> int:
        return len(re.findall(r"DenseMixer is attached to 2 layers", self.log))


class LlamaFactory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        done = run([sys.executable, EXAMPLES / "make_tiny.py", folder / "tiny"])
        assert done.returncode == 0, done.stderr
        self.model = folder / "tiny" / "model"
        self.data = folder / "tiny" / "data"
        self.forks = Forks("llamafactory.train.tuner")

    @functools.cache  # noqa: B019 - lives as long as the session
    def train(
        self,
        yaml: str,
        *overrides: str,
        key: bool = True,
        ranks: int = 1,
        data: str = "sft",
        environment: tuple[tuple[str, str], ...] = (),
    ) -> Run:
        """``llamafactory-cli train`` on the tiny checkpoint, with the example's line ``use_densemixer`` or without.

        It is the installed command on several ranks, which has torchrun start them, and where the environment says
        more, as what imports LLaMA-Factory may read it.
        """
        output = self.folder / f"run{len(list(self.folder.glob('run*')))}"
        text = (EXAMPLES / yaml).read_text()
        if not key:
            text = text.replace("use_densemixer: true\n", "")
            assert "use_densemixer" not in text
        config = self.folder / f"{output.name}.yaml"
        config.write_text(text)
        settings = dict(environment)
        tiny = (self.folder / "tiny" / data).read_text().split()
        arguments = [config, *tiny, f"output_dir={output}", *overrides]
        if ranks > 1:
            settings.update(FORCE_TORCHRUN="1", NPROC_PER_NODE=str(ranks))
        command = self.call if settings else self.fork
        return Run(command("sft" if data == "v1" else "train", *arguments, **settings), output)

    def fork(self, *arguments: str | Path) -> str:
        """What the command printed, whose ``main`` was called in a fork."""
        line = ["llamafactory-cli", *map(str, arguments)]
        well, log = self.forks.run("llamafactory.cli:main", line, {**clean(), **SETTINGS})
        assert well, log[-6000:]
        return log

    def call(self, *arguments: str | Path, **environment: str) -> str:
        """What the installed command printed."""
        done = run([SCRIPTS / "llamafactory-cli", *arguments], **SETTINGS, **environment)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-6000:]
        return log
