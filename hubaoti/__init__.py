"""hubaoti: the package manager for compiled PyTorch graphs.

Importing this imports nothing heavy; the names below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubaoti.api import (
        attach,
        capture,
        compile,
        compile_for,
        compile_matrix,
        detach,
        eager,
        explain,
        explain_for,
        explain_repo,
        load,
        lock,
        pull,
        pull_any_of,
        push,
        run,
        search,
        versions,
    )
    from hubaoti.artifact.bundle import Bundle
    from hubaoti.attachment.attach import Attachment
    from hubaoti.engines.lightweight import LightweightEngine
    from hubaoti.mirror import Artifact

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Attachment",
    "Bundle",
    "LightweightEngine",
    "attach",
    "capture",
    "compile",
    "compile_for",
    "compile_matrix",
    "detach",
    "eager",
    "explain",
    "explain_for",
    "explain_repo",
    "load",
    "lock",
    "pull",
    "pull_any_of",
    "push",
    "run",
    "search",
    "versions",
]
_HOMES = {
    "Artifact": "hubaoti.mirror",
    "Attachment": "hubaoti.attachment.attach",
    "Bundle": "hubaoti.artifact.bundle",
    "LightweightEngine": "hubaoti.engines.lightweight",
}


def __dir__() -> list[str]:
    """The names that are loaded on first use, too."""
    return sorted({*globals(), *__all__, "spaces"})


def __getattr__(name: str) -> Any:
    """Load a verb, a class, or `hubaoti.spaces`, when it is first asked for."""
    if name == "spaces":
        return import_module("hubaoti.spaces")
    if name not in __all__:
        raise AttributeError(f"module 'hubaoti' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "hubaoti.api")), name)
