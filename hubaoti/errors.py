"""Every error raised on purpose: what happened, what to do next, and the exit code of the CLI.

A message says what happened, with the names; the hint says what to do next. Exit codes are part
of the public face: each class that a user can meet has its own. 2 is click's (bad usage), 130 is
SIGINT's.
"""

from __future__ import annotations

from typing import ClassVar

from hubaoti.escape import LINE, bound_message, escape_line


class HubaotiError(Exception):
    """The root of the tree; `hint` says what to do next, and stands below a traceback.

    Both may hold words from outside, so both are kept as they may be printed: escaped, and bounded.
    """

    __notes__: list[str]  # what Python prints below the message of an error that nobody caught

    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        if exit_code is not None:  # else that of the class above
            cls.exit_code = exit_code

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(bound_message(message))
        self._hint, self.__notes__ = "", []
        self.hint = hint

    @property
    def hint(self) -> str:
        """What to do next; empty where nobody knows."""
        return self._hint

    @hint.setter
    def hint(self, hint: str) -> None:
        notes, self._hint = self.notes, bound_message(hint)
        self.__notes__ = [f"hint: {self._hint}", *notes] if self._hint else notes

    @property
    def notes(self) -> list[str]:
        """What was added to it (`add_note`), but for its hint."""
        return self.__notes__[1:] if self._hint else [*self.__notes__]


class BadRequest(HubaotiError, exit_code=2):
    """What was asked cannot be understood: a malformed repo id, variant, recipe, option."""


class NoMatch(HubaotiError, exit_code=3):
    """No artifact of the repo fits this host; the message lists every variant with its reasons."""


class Untrusted(HubaotiError, exit_code=4):
    """Native code from a publisher that is not trusted on this machine."""


class ModelNotFound(HubaotiError, exit_code=5):
    """The model is neither a local folder nor a repo of the Hub."""


class UnknownTask(HubaotiError, exit_code=6):
    """The task is not one of ours, or the model cannot do it."""


class BadDim(HubaotiError, exit_code=7):
    """A dim is malformed, empty (min > max), or not one of the model's."""


class CompileFailed(HubaotiError, exit_code=8):
    """A step of compiling failed; the message names the step and the first line of the cause."""


class CheckFailed(HubaotiError, exit_code=9):
    """The compiled graph answers something else than eager."""


class DigestMismatch(HubaotiError, exit_code=10):
    """Bytes are not the ones that the manifest names."""


class BadManifest(HubaotiError, exit_code=11):
    """A manifest that is not canonical JSON of a schema, or that contradicts itself or its path."""


class NewerSchema(BadManifest, exit_code=12):
    """A manifest written by a newer hubaoti."""


class BadPackage(HubaotiError, exit_code=13):
    """A `.pt2` that is truncated, or whose entries are not the ones the manifest lists."""


class NoArtifact(HubaotiError, exit_code=14):
    """The repo exists and holds no artifact."""


class RepoNotFound(HubaotiError, exit_code=15):
    """The Hub has no such repo or revision, or does not show it to this token."""


class AuthFailed(HubaotiError, exit_code=16):
    """The token is missing, wrong, or may not do this."""


class HubUnreachable(HubaotiError, exit_code=17):
    """The endpoint is down, or dropped the connection."""


class DiskFull(HubaotiError, exit_code=18):
    """There is no room; nothing half-written stays."""


class OutOfBounds(HubaotiError, exit_code=19):
    """An input that the graph was not compiled for; the message names the dim and its bounds."""


class BadInput(HubaotiError, exit_code=20):
    """A tensor whose dtype, stride, alignment or device is not the one the graph takes."""


class MissingConstant(HubaotiError, exit_code=21):
    """The checkpoint has no such tensor by name, or one of another shape or dtype."""


class UnsafeFolder(HubaotiError, exit_code=22):
    """A folder of ours that others own or may write."""


class CannotOpen(HubaotiError, exit_code=23):
    """The system refused to load the graph's library: a noexec disk, a missing library."""


class MissingOps(HubaotiError, exit_code=24):
    """The graph calls ops that no loaded library registers."""


class Conflict(HubaotiError, exit_code=25):
    """The path is taken by another artifact, or the branch moves faster than we do."""


class MissingDependency(HubaotiError, exit_code=26):
    """A package that this command needs is not installed, or not in a supported version."""


class OutputExists(HubaotiError, exit_code=27):
    """The output folder exists and is not a bundle, so it is not ours to replace."""


class OtherProgram(HubaotiError, exit_code=28):
    """The model's own files say that it computes something else than the graph does."""


class NotEnoughMemory(HubaotiError, exit_code=29):
    """Something takes more memory than is free here, or than it may take."""


class AlreadyAttached(HubaotiError, exit_code=30):
    """The module answers by graphs already: detach it before it is attached again."""


class NotAttached(HubaotiError, exit_code=31):
    """The module has no graphs to be detached from."""


class NotServed(HubaotiError, exit_code=32):
    """No graph serves a call, and the module itself was not to answer (`strict=True`)."""


class Quarantined(HubaotiError, exit_code=33):
    """A graph crashed a process, or answered otherwise than where it was built: it stays shut."""


class WorkerEnded(HubaotiError, exit_code=34):
    """A model's own process ended in the middle of a request."""


class NotTried(HubaotiError, exit_code=35):
    """The first open of a graph came to nothing that says anything of it; it was not opened here.

    Its process was ended from outside, or could not even begin: the next one may.
    """


class InUse(HubaotiError, exit_code=36):
    """Another process has the address that was to be listened on, or serves the folder."""


class KernelMissing(HubaotiError, exit_code=37):
    """A kernel that graphs call is not here, and its repo does not have it at the pinned commit."""


class KernelDigestMismatch(HubaotiError, exit_code=38):
    """A kernel's files are not the ones that were pinned: other bytes, or one too many."""


class KernelArchUnsupported(HubaotiError, exit_code=39):
    """A kernel was built for other GPUs, another torch, or another system."""


class KernelSchemaMismatch(HubaotiError, exit_code=40):
    """An op is called otherwise than was pinned, or compiled for, or in no way that we know."""


class KernelConflict(HubaotiError, exit_code=41):
    """This process has another build of a kernel, or another library of its namespace."""


class KernelFailed(HubaotiError, exit_code=42):
    """A kernel refused the call of a graph, or failed in it."""


class Blocked(HubaotiError, exit_code=43):
    """Native code that somebody said may not run on this machine, whoever is trusted."""


class NotBuiltHere(HubaotiError, exit_code=44):
    """What was to be published was not built on this machine, and nobody said so (`--as-is`)."""


class RepoMoved(HubaotiError, exit_code=45):
    """A repo was renamed, or given to somebody else: it has another name than was asked for."""


class RolledBack(HubaotiError, exit_code=46):
    """A tag is at another commit than it was, or a branch at one that does not come after it."""


class Unsigned(HubaotiError, exit_code=47):
    """An artifact whose publisher has to sign it here, and of which no such signature is known."""


class BadSignature(HubaotiError, exit_code=48):
    """A signature that is wrong, of somebody else, or of another artifact, path or repo."""


class LimitsExceeded(HubaotiError, exit_code=49):
    """A manifest claims more tolerance or memory than is allowed here, or ships no answers."""


class NotLocked(HubaotiError, exit_code=50):
    """The lockfile says nothing of what is asked for, so it is not taken."""


class LockMismatch(HubaotiError, exit_code=51):
    """What a repo holds is not what the lockfile says; the message has both digests."""


class BadLock(HubaotiError, exit_code=52):
    """The lockfile is missing, malformed, or of a newer hubaoti."""


class NoVersion(RepoNotFound, exit_code=53):
    """No tag of the repo is a version such as was asked for."""


class ArtifactHeld(HubaotiError, exit_code=55):
    """What was to be removed stays: a living process has it open, or somebody pinned it."""


class MirrorFull(HubaotiError, exit_code=56):
    """What was pulled does not go into the mirror's budget: what is there has to stay."""


class BadExport(HubaotiError, exit_code=57):
    """A file of exported artifacts that is none, is damaged, or was made to harm."""


class OverQuota(HubaotiError, exit_code=58):
    """The endpoint may not store as much more as was to be pushed."""


class BadBackup(HubaotiError, exit_code=59):
    """A folder that is no backup of an endpoint's repos, or a damaged one."""


class NoRepo(NoArtifact, exit_code=60):
    """No repo of the endpoint says that it holds graphs of the program that was asked for."""


class NoModel(HubaotiError, exit_code=61):
    """What a repo lacks is to be compiled, and nothing says of which model."""


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
