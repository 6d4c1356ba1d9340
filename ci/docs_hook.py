"""Pages that stand elsewhere in the repository are part of the site, and their links lead where they lead on the disk.

The site has the folder `docs` at its root, and the files of `ELSEWHERE` at their own paths below it. Links are written
as they are right in the repository, so that they work there too; here they become right in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1].resolve()
ELSEWHERE = (
    "CHANGELOG.md",
    "EVIDENCE.md",
    "benchmarks/RESULTS.md",
    "benchmarks/results.csv",
    "benchmarks/results.png",
    "examples/*/README.md",
    "experiments/PLAN.md",
    "experiments/outcome/*",
)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add what stands outside of the folder `docs`."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between places in the repository into links between places in the site."""
    here = page.file.src_uri
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def in_the_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1])).removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(in_the_site, markdown)
