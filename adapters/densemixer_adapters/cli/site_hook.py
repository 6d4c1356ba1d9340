"""Installs the hook of `densemixer_adapters._boot` into the running environment: ``densemixer setup``.

An ordinary install needs none of this: its ``densemixer.pth`` lies in site-packages. Where the package lies in a folder
that is merely on PYTHONPATH (``pip install --target``, a checkout), Python runs no ``.pth`` files. A file of our own in
site-packages then does the same. Nothing of the user's is written to, and the file does nothing in processes that can't
import the package.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

FILE = "densemixer-setup.pth"
LINE = "import sys; exec('try: import densemixer_adapters._boot as b\\nexcept ImportError: pass\\nelse: b.install()')\n"

_LIVE = "import sys; from densemixer_adapters import _boot; sys.exit(not _boot.is_live())"


class SetupError(RuntimeError):
    """The hook can't be installed. The message says why and what to do instead."""


def runs_in_new_processes() -> bool:
    """Whether a fresh interpreter of this environment has the hook in place."""
    return subprocess.run([sys.executable, "-c", _LIVE], stderr=subprocess.DEVNULL).returncode == 0


def path() -> Path:
    """Where `install` writes."""
    return Path(sysconfig.get_path("purelib"), FILE)


def install() -> Path:
    """Write the file, and see in a fresh interpreter that it works.

    Raises:
        SetupError: It can't be written, or new processes don't run it. No file is left behind.
    """
    file = path()
    instead = "start your command with `densemixer run -- COMMAND`, or install into a virtual environment."
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(LINE)
    except OSError as error:
        raise SetupError(f"can't write {file} ({error.strerror}). Instead, {instead}") from None
    if not runs_in_new_processes():
        file.unlink()
        folder = Path(__file__).parents[2]
        raise SetupError(
            f"with {file}, a new Python process didn't run the hook, so the file is deleted again. Put {folder} on "
            f"PYTHONPATH; if it is there, {instead}"
        )
    return file


def remove() -> Path | None:
    """Undo `install`. Returns the file that was there, if any.

    Raises:
        SetupError: It can't be deleted.
    """
    file = path()
    try:
        file.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SetupError(f"can't delete {file} ({error.strerror})") from None
    return file
