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
        verify,
        versions,
    )
    from hubaoti.artifact.bundle import Bundle
    from hubaoti.attachment.attach import Attachment
    from hubaoti.engines.lightweight import LightweightEngine
    from hubaoti.errors import HubaotiError
    from hubaoti.mirror import Artifact

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Attachment",
    "Bundle",
    "HubaotiError",
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
    "verify",
    "versions",
]
_HOMES = {
    "Artifact": "hubaoti.mirror",
    "Attachment": "hubaoti.attachment.attach",
    "Bundle": "hubaoti.artifact.bundle",
    "HubaotiError": "hubaoti.errors",
    "LightweightEngine": "hubaoti.engines.lightweight",
}


def __dir__() -> list[str]:
    """The public names, all of which are loaded on first use."""
    return sorted({*__all__, "errors", "spaces", "__version__"})


def __getattr__(name: str) -> Any:
    """Load a verb, a class, or a module of the face, when it is first asked for."""
    if name in {"errors", "spaces"}:
        return import_module(f"hubaoti.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'hubaoti' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "hubaoti.api")), name)
