"""The verbs: where compiler, runtime, mirror and hub work together.

Nothing heavy is imported before a verb needs it: `pull` works without torch, a warm one without the
Hub's client.
"""

from __future__ import annotations

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
