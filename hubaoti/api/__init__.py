"""The verbs: where compiler, runtime, mirror and hub work together.

Each is loaded when it is first asked for, with what it needs: `pull` works without torch, a warm
one without the Hub's client, and no verb waits for another's imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubaoti.api.attaching import attach, detach, get_artifact, put
    from hubaoti.api.building import Explanation
    from hubaoti.api.compiling import capture, compile, compile_for, explain, explain_for
    from hubaoti.api.matrix import Outcome, compile_matrix
    from hubaoti.api.publishing import pull, push
    from hubaoti.api.repos import RepoExplanation, RepoVersion, explain_repo, lock, versions
    from hubaoti.api.searching import RepoFound, pull_any_of, search
    from hubaoti.api.texts import Answer, eager, load, recall_task_and_dtype, run
    from hubaoti.api.verifying import Verified, verify

__all__ = [
    "Answer",
    "Explanation",
    "Outcome",
    "RepoExplanation",
    "RepoFound",
    "RepoVersion",
    "Verified",
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
    "get_artifact",
    "load",
    "lock",
    "pull",
    "pull_any_of",
    "push",
    "put",
    "recall_task_and_dtype",
    "run",
    "search",
    "verify",
    "versions",
]
_HOMES = {
    "Answer": "hubaoti.api.texts",
    "Explanation": "hubaoti.api.building",
    "Outcome": "hubaoti.api.matrix",
    "RepoExplanation": "hubaoti.api.repos",
    "RepoFound": "hubaoti.api.searching",
    "RepoVersion": "hubaoti.api.repos",
    "Verified": "hubaoti.api.verifying",
    "attach": "hubaoti.api.attaching",
    "capture": "hubaoti.api.compiling",
    "compile": "hubaoti.api.compiling",
    "compile_for": "hubaoti.api.compiling",
    "compile_matrix": "hubaoti.api.matrix",
    "detach": "hubaoti.api.attaching",
    "eager": "hubaoti.api.texts",
    "explain": "hubaoti.api.compiling",
    "explain_for": "hubaoti.api.compiling",
    "explain_repo": "hubaoti.api.repos",
    "get_artifact": "hubaoti.api.attaching",
    "load": "hubaoti.api.texts",
    "lock": "hubaoti.api.repos",
    "pull": "hubaoti.api.publishing",
    "pull_any_of": "hubaoti.api.searching",
    "push": "hubaoti.api.publishing",
    "put": "hubaoti.api.attaching",
    "recall_task_and_dtype": "hubaoti.api.texts",
    "run": "hubaoti.api.texts",
    "search": "hubaoti.api.searching",
    "verify": "hubaoti.api.verifying",
    "versions": "hubaoti.api.repos",
}


def __dir__() -> list[str]:
    """The public names, all of which are loaded on first use."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Load a verb, or what one answers, when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hubaoti.api' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found
