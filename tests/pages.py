"""The pages of this repository, and the blocks of code on them."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
WHERE = ("*.md", ".github/**/*.md", "benchmarks/*.md", "docs/**/*.md", "examples/*/*.md")
PAGES = sorted(path for pattern in WHERE for path in REPOSITORY.glob(pattern))

FENCE = re.compile(
    r"(?:^[ ]*<!--\s*(?P<comment>[^>]*?)\s*-->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n`]*\n(?P<text>.*?)^(?P=indent)```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code, and the comment in the line above it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    def commands(self) -> list[str]:
        """The lines that are typed: all of a shell's, and those behind a prompt. Continued lines are one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip()]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")),
            found["language"],
            textwrap.dedent(found["text"]),
            found["comment"] or "",
        )
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in BLOCKS if block.language in ("bash", "console", "sh")]
