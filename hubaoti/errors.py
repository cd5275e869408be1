"""Every error raised on purpose: what happened, what to do next, and the exit code of the CLI.

A message says what happened, with the names; the hint says what to do next. Exit codes are part
of the public face: each class that a user can meet has its own. 2 is click's (bad usage), 130 is
SIGINT's.
"""

from __future__ import annotations

from typing import ClassVar

from hubaoti.escape import LINE, bound_message, escape_line


class HubaotiError(Exception):
    """The root of the tree; `hint` says what to do next.

    Both may hold words from outside, so both are kept as they may be printed: escaped, and bounded.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(bound_message(message))
        self.hint = bound_message(hint)


class BadRequest(HubaotiError):
    """What was asked cannot be understood: a malformed repo id, variant, recipe, option."""

    exit_code = 2


class NoMatch(HubaotiError):
    """No artifact of the repo fits this host; the message lists every variant with its reasons."""

    exit_code = 3


class Untrusted(HubaotiError):
    """Native code from a publisher that is not trusted on this machine."""

    exit_code = 4


class ModelNotFound(HubaotiError):
    """The model is neither a local folder nor a repo of the Hub."""

    exit_code = 5


class UnknownTask(HubaotiError):
    """The task is not one of ours, or the model cannot do it."""

    exit_code = 6


class BadDim(HubaotiError):
    """A dim is malformed, empty (min > max), or not one of the model's."""

    exit_code = 7


class CompileFailed(HubaotiError):
    """A step of compiling failed; the message names the step and the first line of the cause."""

    exit_code = 8


class CheckFailed(HubaotiError):
    """The compiled graph answers something else than eager."""

    exit_code = 9


class DigestMismatch(HubaotiError):
    """Bytes are not the ones that the manifest names."""

    exit_code = 10


class BadManifest(HubaotiError):
    """A manifest that is not canonical JSON of a schema, or that contradicts itself or its path."""

    exit_code = 11


class NewerSchema(BadManifest):
    """A manifest written by a newer hubaoti."""

    exit_code = 12


class BadPackage(HubaotiError):
    """A `.pt2` that is truncated, or whose entries are not the ones the manifest lists."""

    exit_code = 13


class NoArtifact(HubaotiError):
    """The repo exists and holds no artifact."""

    exit_code = 14


class RepoNotFound(HubaotiError):
    """The Hub has no such repo or revision, or does not show it to this token."""

    exit_code = 15


class AuthFailed(HubaotiError):
    """The token is missing, wrong, or may not do this."""

    exit_code = 16


class HubUnreachable(HubaotiError):
    """The endpoint is down, or dropped the connection."""

    exit_code = 17


class DiskFull(HubaotiError):
    """There is no room; nothing half-written stays."""

    exit_code = 18


class OutOfBounds(HubaotiError):
    """An input that the graph was not compiled for; the message names the dim and its bounds."""

    exit_code = 19


class BadInput(HubaotiError):
    """A tensor whose dtype, stride, alignment or device is not the one the graph takes."""

    exit_code = 20


class MissingConstant(HubaotiError):
    """The checkpoint has no such tensor by name, or one of another shape or dtype."""

    exit_code = 21


class UnsafeFolder(HubaotiError):
    """A folder of ours that others own or may write."""

    exit_code = 22


class CannotOpen(HubaotiError):
    """The system refused to load the graph's library: a noexec disk, a missing library."""

    exit_code = 23


class MissingOps(HubaotiError):
    """The graph calls ops that no loaded library registers."""

    exit_code = 24


class Conflict(HubaotiError):
    """The path is taken by another artifact, or the branch moves faster than we do."""

    exit_code = 25


class MissingDependency(HubaotiError):
    """A package that this command needs is not installed, or not in a supported version."""

    exit_code = 26


class OutputExists(HubaotiError):
    """The output folder exists and is not a bundle, so it is not ours to replace."""

    exit_code = 27


class OtherProgram(HubaotiError):
    """The model's own files say that it computes something else than the graph does."""

    exit_code = 28


class NotEnoughMemory(HubaotiError):
    """Something takes more memory than is free here, or than it may take."""

    exit_code = 29


class AlreadyAttached(HubaotiError):
    """The module answers by graphs already: detach it before it is attached again."""

    exit_code = 30


class NotAttached(HubaotiError):
    """The module has no graphs to be detached from."""

    exit_code = 31


class NotServed(HubaotiError):
    """No graph serves a call, and the module itself was not to answer (`strict=True`)."""

    exit_code = 32


class Quarantined(HubaotiError):
    """A graph crashed a process, or answered otherwise than where it was built: it stays shut."""

    exit_code = 33


class WorkerEnded(HubaotiError):
    """A model's own process ended in the middle of a request."""

    exit_code = 34


class NotTried(HubaotiError):
    """The first open of a graph came to nothing that says anything of it; it was not opened here.

    Its process was ended from outside, or could not even begin: the next one may.
    """

    exit_code = 35


def rebuild_error(kind: str, message: str, hint: str) -> HubaotiError:
    """An error that another process told of, as it was there."""
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, HubaotiError):
        return found(message, hint=hint)
    return HubaotiError(message, hint=hint)


def first_line(why: BaseException | str) -> str:
    """The first line of somebody else's message that says something, as long as a person reads."""
    lines = (line.strip() for line in str(why).splitlines())
    nothing = why if isinstance(why, str) else type(why).__name__
    return escape_line(next((line for line in lines if line), nothing), LINE)
