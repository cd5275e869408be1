"""hubaoti: the package manager for compiled PyTorch graphs.

Importing this imports nothing heavy; the names below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubaoti.api import attach, capture, compile, detach, eager, explain, load, pull, push
    from hubaoti.engines.lightweight import LightweightEngine

__version__ = "0.1.0"
__all__ = [
    "LightweightEngine",
    "attach",
    "capture",
    "compile",
    "detach",
    "eager",
    "explain",
    "load",
    "pull",
    "push",
]


def __getattr__(name: str) -> Any:
    """Load a verb, an engine, or `hubaoti.spaces`, when it is first asked for."""
    if name == "spaces":
        return import_module("hubaoti.spaces")
    if name not in __all__:
        raise AttributeError(f"module 'hubaoti' has no attribute {name!r}")
    if name == "LightweightEngine":
        from hubaoti.engines import lightweight

        return lightweight.LightweightEngine
    from hubaoti import api

    return getattr(api, name)
