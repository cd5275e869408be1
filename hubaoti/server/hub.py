"""The root folder and all that lives in it: what the routes work on."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hubaoti.errors import BadRequest, DiskFull, HubaotiError, InUse, UnsafeFolder
from hubaoti.server.auth import Guard
from hubaoti.server.database import Database
from hubaoti.server.errors import says_full
from hubaoti.server.history import History
from hubaoti.server.ingest import Ingest
from hubaoti.server.metrics import Metrics
from hubaoti.server.objects import Objects
from hubaoti.server.pull_through import PullThrough, find_object
from hubaoti.server.trees import TreeEntry
from hubaoti.server.upstream import Upstream
from hubaoti.server.validation import is_owner

INDEX = "hub.sqlite3"
"""The index, in a folder that is served and in its backup."""


@dataclass(frozen=True, slots=True)
class Service:
    """How a root is served: by which names beside loopback's, before which upstream, how full."""

    allow_hosts: tuple[str, ...] = ()
    upstream: Upstream | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Hub:
    """One endpoint's state; the only thing that requests share."""

    database: Database
    objects: Objects
    history: History
    ingest: Ingest
    guard: Guard
    metrics: Metrics
    user: str
    lock: IO[str]
    through: PullThrough | None = None

    @property
    def epoch(self) -> str:
        """What stands in the URL of Xet uploads: the root's own, and how often chunks were lost."""
        with self.database.reading() as db:
            known = dict(db.execute("select key, value from meta"))
        return f"{known['epoch']}.{known.get('forgotten', 0)}"

    def knows_epoch(self, epoch: str) -> bool:
        """Whether it is this root's, now or before chunks were lost."""
        return epoch.partition(".")[0] == self.epoch.partition(".")[0]

    def find_object(self, entry: TreeEntry) -> str | None:
        """The digest of a file's bytes, None where they are not here."""
        return find_object(self.database, self.objects, entry)

    def close(self) -> None:
        """Let go of the root, for another process to open."""
        if self.through is not None:
            self.through.close()
        self.metrics.save()
        self.database.close()
        self.lock.close()


def open_hub(
    root: Path, token: str | None = None, user: str = "local", service: Service | None = None
) -> Hub:
    """Open the root, which is made when it is not there; it is this process's alone.

    Raises:
        BadRequest: the token or the user's name cannot be one.
        UnsafeFolder: others own or may enter the folder, or it holds something else.
        DiskFull: there is no room.
        InUse: another process serves it.
    """
    service = service or Service()
    if token is None:
        token = f"hf_{secrets.token_urlsafe(24)}"
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise BadRequest("a token is printable ASCII without spaces")
    if not is_owner(user):
        raise BadRequest(f"a user cannot be named {user!r}")
    with explain_folder_errors(root), ExitStack() as undo:
        claim(root)
        lock = undo.enter_context(_lock(root, "lock", "another process serves"))
        database = undo.enter_context(closing(Database(root / INDEX)))
        database.constant("epoch", secrets.token_hex(8))
        objects = Objects(root, service.max_bytes)
        hub = Hub(
            database=database,
            objects=objects,
            history=History(objects, user),
            ingest=Ingest(root, database, objects),
            guard=Guard(token, bytes.fromhex(database.constant("secret", secrets.token_hex(32)))),
            metrics=Metrics(database),
            user=user,
            lock=lock,
            through=(
                PullThrough(service.upstream, database, objects) if service.upstream else None
            ),
        )
        undo.pop_all()
    if hub.through is not None:
        hub.through.look_for_shadows()
    return hub


@contextmanager
def open_root(root: Path, *, alone: bool = False) -> Iterator[Database]:
    """The index of a folder that may be served meanwhile; `alone`, nobody else looks after it.

    Raises:
        BadRequest: the folder holds no repos.
        UnsafeFolder: others own or may enter it.
        DiskFull: there is no room.
        InUse: somebody else looks after it.
    """
    with explain_folder_errors(root), ExitStack() as undo:
        if not (root / INDEX).is_file():
            hint = "name the folder that is served: --root"
            raise BadRequest(f"{root} holds no repos", hint=hint)
        claim(root)
        if alone:
            undo.enter_context(_lock(root, "upkeep", "gc or a backup is at work in"))
        yield undo.enter_context(closing(Database(root / INDEX)))


@contextmanager
def explain_folder_errors(folder: Path, called: str = "--root") -> Iterator[None]:
    """Say in words what is wrong with a folder, its disk or its index.

    `called` is how a user names the folder.
    """
    try:
        yield
    except (OSError, sqlite3.DatabaseError) as error:
        if says_full(error):
            hint = f"free some space there, or choose another {called}"
            raise DiskFull(f"no room on the disk of {folder}", hint=hint) from error
        if isinstance(error, OSError):
            exists = isinstance(error, FileExistsError)  # and is no folder
            reason = "it is no folder" if exists else error.strerror
            message = f"{folder} cannot be used: {reason}"
            raise UnsafeFolder(message, hint=f"choose another {called}") from error
        hint = "move the folder away and start with an empty one"
        raise HubaotiError(f"{folder / INDEX} cannot be read: {error}", hint=hint) from error


def claim(root: Path, called: str = "--root") -> None:
    """Make the folder ours alone: 0700, empty or a hub's; `called` is how a user names it.

    Raises:
        UnsafeFolder: others own or may enter it, or it holds something else.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    empty = next(root.iterdir(), None) is None
    stat = root.stat()
    if stat.st_uid != os.geteuid():
        raise UnsafeFolder(f"{root} belongs to another user", hint=f"choose another {called}")
    if empty:
        root.chmod(0o700)
    elif stat.st_mode & 0o077:
        raise UnsafeFolder(f"{root} is open to other users", hint=f"chmod 700 {root}")
    elif not (root / INDEX).exists() and not (root / "lock").exists():
        hint = f"choose another {called}: an empty or a new folder"
        raise UnsafeFolder(f"{root} holds something else than a hub", hint=hint)


def _lock(root: Path, name: str, message: str) -> IO[str]:
    file = (root / name).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        hint = "wait for the other one, stop it, or choose another --root"
        raise InUse(f"{message} {root}", hint=hint) from error
    return file
