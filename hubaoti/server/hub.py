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
from hubaoti.server.objects import Objects
from hubaoti.server.pull_through import PullThrough, find_object
from hubaoti.server.trees import TreeEntry
from hubaoti.server.upstream import Upstream
from hubaoti.server.validation import is_owner

_INDEX = "hub.sqlite3"


@dataclass(frozen=True, slots=True)
class Service:
    """How a root is served: by which names beside loopback's, and in front of which upstream."""

    allow_hosts: tuple[str, ...] = ()
    upstream: Upstream | None = None


@dataclass(frozen=True)
class Hub:
    """One endpoint's state; the only thing that requests share."""

    database: Database
    objects: Objects
    history: History
    ingest: Ingest
    guard: Guard
    user: str
    epoch: str
    lock: IO[str]
    through: PullThrough | None = None

    def find_object(self, entry: TreeEntry) -> str | None:
        """The digest of a file's bytes, None where they are not here."""
        return find_object(self.database, self.objects, entry)

    def close(self) -> None:
        """Let go of the root, for another process to open."""
        if self.through is not None:
            self.through.close()
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
    upstream = service.upstream if service else None
    if token is None:
        token = f"hf_{secrets.token_urlsafe(24)}"
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise BadRequest("a token is printable ASCII without spaces")
    if not is_owner(user):
        raise BadRequest(f"a user cannot be named {user!r}")
    with _explain_root_errors(root), ExitStack() as undo:
        _claim(root)
        lock = undo.enter_context(_lock(root))
        database = undo.enter_context(closing(Database(root / _INDEX)))
        objects = Objects(root)
        hub = Hub(
            database=database,
            objects=objects,
            history=History(objects, user),
            ingest=Ingest(root, database, objects),
            guard=Guard(token, bytes.fromhex(database.constant("secret", secrets.token_hex(32)))),
            user=user,
            epoch=database.constant("epoch", secrets.token_hex(8)),
            lock=lock,
            through=PullThrough(upstream, database, objects) if upstream else None,
        )
        undo.pop_all()
    if hub.through is not None:
        hub.through.look_for_shadows()
    return hub


@contextmanager
def _explain_root_errors(root: Path) -> Iterator[None]:
    """Say in words what is wrong with the folder, its disk or its index."""
    try:
        yield
    except (OSError, sqlite3.DatabaseError) as error:
        if says_full(error):
            hint = "free some space there, or choose another --root"
            raise DiskFull(f"no room on the disk of {root}", hint=hint) from error
        if isinstance(error, OSError):
            raise UnsafeFolder(f"{root} cannot be used: {error.strerror}") from error
        hint = "move the folder away and start with an empty one"
        raise HubaotiError(f"{root / _INDEX} cannot be read: {error}", hint=hint) from error


def _claim(root: Path) -> None:
    """Make the folder ours alone: 0700, empty or a hub's."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    empty = next(root.iterdir(), None) is None
    stat = root.stat()
    if stat.st_uid != os.geteuid():
        raise UnsafeFolder(f"{root} belongs to another user", hint="choose another --root")
    if empty:
        root.chmod(0o700)
    elif stat.st_mode & 0o077:
        raise UnsafeFolder(f"{root} is open to other users", hint=f"chmod 700 {root}")
    elif not (root / _INDEX).exists() and not (root / "lock").exists():
        hint = "choose another --root: an empty or a new folder"
        raise UnsafeFolder(f"{root} holds something else than a hub", hint=hint)


def _lock(root: Path) -> IO[str]:
    file = (root / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        hint = "stop the other one, or choose another --root"
        raise InUse(f"{root} is served by another process", hint=hint) from error
    return file
