"""A page of HTML with verdicts, pictures and numbers, that stands alone."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from densemixer_adapters.metrics.verdict import Verdict


class Table(NamedTuple):
    """Of text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: Its heading.
        verdict: What it says.
        picture: A PNG.
        tables: Below that.
        note: What the picture shows, and where all is from.
    """

    name: str
    verdict: Verdict
    picture: bytes
    tables: Sequence[Table]
    note: str

    @property
    def kind(self) -> str:
        return {True: "works", False: "idle", None: "unknown"}[self.verdict.works]

    @property
    def encoded(self) -> str:
        return base64.b64encode(self.picture).decode()


def page(title: str, sections: Sequence[Section]) -> bytes:
    """The page's HTML."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    html: str = pages.get_template("page.html").render(title=title, sections=sections)
    return html.encode()


def replace(path: Path, content: bytes) -> Path:
    """Write a file anew. A link in its place is replaced, not followed."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:  # fails if something is there again
        file.write(content)
    return path
