from __future__ import annotations

from types import SimpleNamespace as DPOConfig

__all__ = ["DPOConfig"]
