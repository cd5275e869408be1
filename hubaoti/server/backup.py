"""Everything that an endpoint stores, as a folder: taken while it serves, and put back.

The index is SQLite's own copy of one moment; files are copied after it, by their digests, and `gc`
waits meanwhile, so that all that the copy names is there. The folder is 0700: hashes of tokens are
in it, and the secret by which uploads are signed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

from hubaoti.errors import BadBackup, BadRequest
from hubaoti.server import trees
from hubaoti.server.errors import ServerError
from hubaoti.server.hub import INDEX, claim, open_root
from hubaoti.server.validation import check_digest

_PIECE = 2**20
_SEAL = "backup"  # under which the index of a backup keeps what files it has


@dataclass(frozen=True, slots=True)
class Copied:
    """How many files, and bytes of them, a copy has, and how many were copied now."""

    files: int
    bytes: int
    new: int


def back_up(root: Path, to: Path) -> Copied:
    """Copy all that a folder holds, also while it is served, to a backup that is new or is older.

    Of an older one the files stay that it has already. Old commits whose files `gc` removed have
    none there, either.

    Raises:
        BadRequest: there are no repos in the folder.
        UnsafeFolder: `to` is another's, open to others, or holds something else.
        InUse: gc, or another backup, is at work.
        BadBackup: a file of the endpoint's is damaged.
    """
    claim(to)
    (to / "lock").touch(0o600)  # by which it is known for ours, if this ends early
    with open_root(root, alone=True) as database:
        index = to / f"{INDEX}.new"
        index.unlink(missing_ok=True)
        with closing(_create(index)) as copy:
            with database.reading() as db:
                db.backup(copy)
            _leave_out_uploads(copy)
            named = sorted(set(_list_digests(copy)))
            there = [digest for digest in named if _path(root, digest).exists()]
            new = sum(_copy(root, to, digest) for digest in there)
            with copy:
                copy.execute("insert or replace into meta values (?, ?)", (_SEAL, _seal(there)))
        index.replace(to / INDEX)
    return Copied(len(there), sum(_path(to, d).stat().st_size for d in there), new)


def restore(backup: Path, root: Path) -> Copied:
    """Make a folder that can be served of a backup; all its files are hashed.

    Raises:
        BadBackup: it is none, or a file in it is damaged.
        BadRequest: something is in the folder.
        UnsafeFolder: it is another's.
    """
    if not (backup / INDEX).is_file():
        raise BadBackup(f"{backup} is no backup", hint="name the folder that serve backup wrote")
    if root.is_dir() and any(root.iterdir()):
        hint = "restore into a new folder: --root"
        raise BadRequest(f"{root} is not empty", hint=hint)
    claim(root)
    there = _list_files(backup)
    try:
        for digest in there:
            _copy(backup, root, digest)
    except BaseException:
        shutil.rmtree(root / "objects", ignore_errors=True)
        raise
    shutil.copyfile(backup / INDEX, root / f"{INDEX}.new")
    (root / f"{INDEX}.new").replace(root / INDEX)
    return Copied(len(there), sum(_path(root, d).stat().st_size for d in there), len(there))


def _list_files(backup: Path) -> list[str]:
    """The digests of the files of a backup, which has all of them."""
    hint = "take a new backup, or restore an older one"
    with closing(
        sqlite3.connect(f"{(backup / INDEX).absolute().as_uri()}?mode=ro", uri=True)
    ) as db:
        try:
            named = sorted(set(_list_digests(db)))
            seal = db.execute("select value from meta where key = ?", (_SEAL,)).fetchone()
        except (sqlite3.DatabaseError, ValueError, TypeError, zlib.error) as error:
            message = f"the index of {backup} cannot be read: {error}"
            raise BadBackup(message, hint=hint) from error
    there = [digest for digest in named if _path(backup, digest).exists()]
    if seal != (_seal(there),):
        raise BadBackup(f"{backup} lacks files that were in it", hint=hint)
    return there


def _seal(digests: list[str]) -> str:
    """What tells these files from more or fewer."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _create(index: Path) -> Connection:
    os.close(os.open(index, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return sqlite3.connect(index)


def _leave_out_uploads(copy: Connection) -> None:
    """Forget packed uploads, which are not copied: clients send them again, by another epoch."""
    with copy:
        copy.execute("delete from xorb")
        copy.execute("update meta set value = ? where key = 'epoch'", (secrets.token_hex(8),))
    copy.execute("pragma journal_mode = delete")  # one file, and none beside it


def _list_digests(index: Connection) -> Iterator[str]:
    """The digests of all files that any commit names."""
    known = dict(index.execute("select oid, sha256 from copied_blob"))
    for (row,) in index.execute("select tree from revision"):
        for entry in trees.load_tree(row).values() if row else ():
            if digest := entry.sha256 or known.get(entry.blob):
                yield _check_digest(digest)


def _check_digest(word: object) -> str:
    """A digest that an index names, which becomes a path."""
    try:
        return check_digest(word)
    except ServerError as error:
        hint = "take a new backup, or restore an older one"
        raise BadBackup(f"the index names no file: {error.message}", hint=hint) from None


def _path(root: Path, digest: str) -> Path:
    return root / "objects" / digest[:2] / digest


def _copy(source: Path, to: Path, digest: str) -> bool:
    """Copy a file, hashed on its way; False where it is there already.

    Raises:
        BadBackup: its bytes are not those of its digest.
    """
    target, hashed = _path(to, digest), hashlib.sha256()
    if target.exists():
        return False
    for folder in (target.parent.parent, target.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    temporary = target.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with _path(source, digest).open("rb") as reading, temporary.open("xb") as writing:
        while piece := reading.read(_PIECE):
            hashed.update(piece)
            writing.write(piece)
        writing.flush()
        os.fchmod(writing.fileno(), 0o400)
        os.fsync(writing.fileno())
    if hashed.hexdigest() != digest:
        temporary.unlink()
        hint = "restore that file from elsewhere, or remove it where it lies"
        raise BadBackup(f"{_path(source, digest)} is damaged: its bytes are others", hint=hint)
    temporary.replace(target)
    return True
