"""The reward of the RL task: does a completed statement compile, and does it use only names that are there?"""

from __future__ import annotations

import ast
import builtins
import re
import warnings

NAME = re.compile(r"[^\W\d]\w*")
BUILTINS = frozenset(dir(builtins))


def reward(context: str, start: str, completion: str) -> float:
    """1 if the completion makes one correct statement of its start, else 0.

    Correct is what passes three checks, none of which looks at how the statement really went on:

    - the line, up to its end, parses as exactly one statement;
    - at least one name begins in the completion, so that it isn't enough to stop, or to close brackets;
    - every name that ends in the completion, or where it begins, occurs in the context or the start, or is a builtin.
      Attributes and keywords of calls are free, as they are for a compiler.

    Args:
        context: The source before the statement, as far as the model sees it.
        start: The beginning of the statement, without its indentation.
        completion: What the model adds. Text after its first line break is ignored; without one it hasn't come to an
            end, and earns nothing.
    """
    line, ended, _ = completion.partition("\n")
    if not ended:
        return 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            body = ast.parse(start + line).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # what ast.parse raises for text that isn't Python
        return 0.0
    if len(body) != 1:
        return 0.0
    cut = len(start.encode())  # ast counts bytes
    names = [node for node in ast.walk(body[0]) if isinstance(node, ast.Name) and (node.end_col_offset or 0) >= cut]
    known = BUILTINS | set(NAME.findall(context)) | _finished_names(start)
    fresh = any(node.col_offset >= cut for node in names)
    return float(fresh and all(node.id in known for node in names))


def _finished_names(start: str) -> set[str]:
    """The names in it; one at its very end may go on."""
    return {match.group() for match in NAME.finditer(start) if match.end() < len(start)}
