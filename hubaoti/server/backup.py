"""Everything that an endpoint stores, as a folder: taken while it serves, and put back.

The index is SQLite's own copy of one moment; files are copied after it, by their digests, and `gc`
waits meanwhile, so that all that the copy names is there. The folder is 0700: hashes of tokens are
in it, and the secret by which uploads are signed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import IO

from hubaoti.errors import BadBackup, BadRequest, InUse
from hubaoti.folder_trees import remove_tree
from hubaoti.server import trees
from hubaoti.server.errors import ServerError
from hubaoti.server.hub import INDEX, claim, explain_folder_errors, open_root
from hubaoti.server.validation import check_digest

_PIECE = 2**20
_SEAL = "backup"  # under which the index of a backup, and no other, keeps what files it has
_SERVED = "tmp"  # what a folder has once an endpoint was served from it, and no backup has
_CALLED = "folder"
_AGAIN = "take a new backup, or restore an older one"


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
        BadRequest: there are no repos in the folder, or `to` is it, lies in it or holds it.
        UnsafeFolder: `to` is another's, open to others, or holds something else.
        InUse: gc, or another backup, is at work.
        BadBackup: a file of the endpoint's is damaged; or `to` is the folder of an endpoint.
    """
    _require_apart(root, to)
    with explain_folder_errors(to, _CALLED):
        _require_no_endpoint(to)
    with (
        open_root(root, alone=True) as database,
        explain_folder_errors(to, _CALLED),
        _claim_backup(to),
    ):
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
        _put_index(index, to)
        return Copied(len(there), sum(_path(to, d).stat().st_size for d in there), new)


def restore(backup: Path, root: Path) -> Copied:
    """Make a folder that can be served of a backup; all its files are hashed.

    Raises:
        BadBackup: it is none, or a file in it is damaged.
        BadRequest: something is in the folder; or it lies in the backup or holds it.
        InUse: the backup is being written, or served.
        UnsafeFolder: the folder is another's.
    """
    _require_apart(backup, root)
    with _open_backup(backup) as index, explain_folder_errors(root):
        if root.is_dir() and any(root.iterdir()):
            hint = "restore into a new folder: --root"
            raise BadRequest(f"{root} is not empty", hint=hint)
        there = _list_files(backup, index)
        claim(root)
        try:
            for digest in there:
                _copy(backup, root, digest)
            _copy_index(index, root)
        except BaseException:
            remove_tree(root / "objects", ignore_errors=True)
            (root / f"{INDEX}.new").unlink(missing_ok=True)
            raise
        return Copied(len(there), sum(_path(root, d).stat().st_size for d in there), len(there))


def refuse_backup(root: Path) -> None:
    """See that a folder is no backup, whose files have to stay.

    Raises:
        BadRequest: it is one.
        UnsafeFolder: it cannot be looked at.
    """
    with explain_folder_errors(root):
        if (root / INDEX).is_file() and _is_backup(root):
            message = f"{root} is a backup, which could not be restored without all its files"
            raise BadRequest(message, hint="name the folder that is served: --root")


def _require_apart(source: Path, to: Path) -> None:
    """See that a copy touches nothing of what is copied, whatever the two are called.

    Raises:
        BadRequest: they are one folder, or one lies in the other.
    """
    for one, other in ((source, to), (source / "objects", to / "objects")):
        inside, around = _lies_in(other, one), _lies_in(one, other)
        if inside or around:
            relation = "lies in" if inside else "holds"
            relation = "is the same folder as" if inside and around else relation
            message = f"{other} {relation} {one}, which a copy there would spoil"
            hint = f"name a folder that is neither in {source} nor above it"
            raise BadRequest(message, hint=hint)


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether a folder, existing or not, is another one or lies in it, by device and inode."""
    place = Path(os.path.realpath(inner))
    for folder in (place, *place.parents):
        with suppress(OSError):
            if folder.samefile(outer):
                return True
    return False


def _require_no_endpoint(to: Path) -> None:
    """See that a backup replaces no index but that of an older one; nothing is written.

    Raises:
        BadBackup: an endpoint is served from there, or was.
    """
    if ((to / INDEX).exists() or (to / _SERVED).exists()) and not _is_backup(to):
        message = f"{to} is no backup: an endpoint is served from it, and would lose its repos"
        raise BadBackup(message, hint="name a new folder, or an older backup")


def _is_backup(folder: Path) -> bool:
    """Whether the index of a folder was sealed by a backup, and never served."""
    if (folder / _SERVED).exists():
        return False
    # As it lies there: SQLite would make files beside one that was opened since it was sealed.
    with closing(_open_index(folder, "mode=ro&immutable=1")) as index:
        return _read_seal(index) is not None


def _open_index(folder: Path, how: str) -> Connection:
    return sqlite3.connect(f"{(folder / INDEX).absolute().as_uri()}?{how}", uri=True)


def _read_seal(index: Connection) -> str | None:
    row = index.execute("select value from meta where key = ?", (_SEAL,)).fetchone()
    return None if row is None else str(row[0])


@contextmanager
def _claim_backup(to: Path) -> Iterator[None]:
    """Make a backup's folder ours alone, while it is written."""
    claim(to, _CALLED)
    (to / "lock").touch(0o600)  # by which it is known for ours, if this ends early
    with _lock(to, "a", fcntl.LOCK_EX):
        yield


@contextmanager
def _open_backup(backup: Path) -> Iterator[Connection]:
    """The index of a backup, which nobody writes meanwhile.

    Raises:
        BadBackup: it is none, or cannot be read.
        InUse: somebody writes it.
    """
    with ExitStack() as undo:
        try:
            if not (backup / INDEX).is_file():
                hint = "name the folder that serve backup wrote"
                raise BadBackup(f"{backup} is no backup", hint=hint)
            if (backup / "lock").exists():
                undo.enter_context(_lock(backup, "r", fcntl.LOCK_SH))
            index = undo.enter_context(closing(_open_index(backup, "mode=ro")))
        except (OSError, sqlite3.DatabaseError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadBackup(f"{backup} cannot be read: {reason}", hint=_AGAIN) from error
        yield index


def _lock(folder: Path, mode: str, how: int) -> IO[str]:
    """The lock of a folder, held until it is closed; on a disk without locks nobody is waited for.

    Raises:
        InUse: an endpoint is served from it, or a backup is written there.
    """
    file = (folder / "lock").open(mode)
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        hint = "wait for the other one, stop it, or choose another folder"
        message = f"another process serves {folder}, or works on a backup there"
        raise InUse(message, hint=hint) from error
    except OSError:
        pass  # a disk without locks
    return file


def _list_files(backup: Path, index: Connection) -> list[str]:
    """The digests of the files of a backup, which has all of them."""
    try:
        named = sorted(set(_list_digests(index)))
        seal = _read_seal(index)
    except (sqlite3.DatabaseError, ValueError, TypeError, zlib.error) as error:
        message = f"the index of {backup} cannot be read: {error}"
        raise BadBackup(message, hint=_AGAIN) from error
    there = [digest for digest in named if _path(backup, digest).exists()]
    if seal == _seal(there):
        return there
    if seal is None or (backup / _SERVED).exists():
        message = f"{backup} is no backup: an endpoint is served from it, or was"
        hint = f"serve it as it is, or copy it: serve backup --root {backup}"
        raise BadBackup(message, hint=hint)
    raise BadBackup(f"{backup} lacks files that were in it", hint=_AGAIN)


def _copy_index(index: Connection, root: Path) -> None:
    """Put the index of a backup into a folder that is to be served, and is no backup."""
    with closing(_create(root / f"{INDEX}.new")) as copy:
        index.backup(copy)
        copy.execute("pragma journal_mode = delete")
        with copy:
            copy.execute("delete from meta where key = ?", (_SEAL,))
    _put_index(root / f"{INDEX}.new", root)


def _put_index(index: Path, folder: Path) -> None:
    """Let an index take its place; what SQLite left beside an older one is not of this one."""
    for end in ("-wal", "-shm", "-journal"):
        (folder / f"{INDEX}{end}").unlink(missing_ok=True)
    index.replace(folder / INDEX)


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
        raise BadBackup(f"the index names no file: {error.message}", hint=_AGAIN) from None


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
    with temporary.open("xb") as writing:
        for piece in _read_pieces(_path(source, digest)):
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


def _read_pieces(file: Path) -> Iterator[bytes]:
    """A file's bytes; BadBackup where they cannot be read."""
    try:
        with file.open("rb") as reading:
            while piece := reading.read(_PIECE):
                yield piece
    except OSError as error:
        hint = "see that its disk is well, or restore that file from elsewhere"
        raise BadBackup(f"{file} cannot be read: {error.strerror}", hint=hint) from error
