"""What no branch and no tag reaches leaves the disk, also while the endpoint runs.

A branch reaches its last commit, and those before it for as many days as are kept since each was
followed by another; a tag reaches its commit. Old commits stay in logs, without their files. What
is removed is judged again within the transaction that keeps commits out, and a commit looks for
its files within its own: so none names a file that is gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection

from hubaoti.errors import BadRequest
from hubaoti.server import auth, trees
from hubaoti.server.backup import refuse_backup
from hubaoti.server.database import Database
from hubaoti.server.hub import open_root
from hubaoti.server.ingest import forget_xorbs

_GRACE = auth.LIFETIME
"""Seconds at least since a file came, or was named in an upload: as long as one may last."""

_DAY = 86400
_LONGEST = 36500  # days: more than any commit is old, and less than what dates can say
_XORBS = "xorbs"


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed, or would be: files by their digests, their bytes, copies of repos."""

    files: tuple[str, ...]
    bytes: int
    copies: tuple[str, ...]


@dataclass
class _Reach:
    """Which files branches and tags reach; a commit's tree is read once."""

    cutoff: float
    _trees: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)

    def list_kept(self, db: Connection) -> set[str]:
        """The digests of all files that are reached."""
        since = datetime.fromtimestamp(self.cutoff, UTC).isoformat(timespec="milliseconds")
        query = f"select repo, oid from ref where repo not in (select id from ({_UNSEEN}))"
        kept: set[str] = set()
        for repo, head in db.execute(query, (int(self.cutoff),)).fetchall():
            for oid in _walk(db, repo, head, since.replace("+00:00", "Z")):
                kept |= self._list_files(db, repo, oid)
        known = dict(db.execute("select oid, sha256 from copied_blob"))
        return {known.get(each, each) for each in kept}

    def _list_files(self, db: Connection, repo: int, oid: str) -> frozenset[str]:
        found = self._trees.get((repo, oid))
        if found is None:
            query = "select tree from revision where repo = ? and oid = ?"
            (row,) = db.execute(query, (repo, oid)).fetchone()
            entries = trees.load_tree(row).values() if row else ()
            found = frozenset(entry.sha256 or entry.blob for entry in entries)
            if row:
                self._trees[repo, oid] = found
        return found


_UNSEEN = "select repo.id, kind, name from repo join copied on repo = repo.id where seen < ?"


def _walk(db: Connection, repo: int, head: str, since: str) -> Iterator[str]:
    """A commit, and those before it whose follower is as young as that."""
    following: str | None = head
    while following is not None:
        yield following
        query = "select parent, date from revision where repo = ? and oid = ?"
        parent, date = db.execute(query, (repo, following)).fetchone()
        following = parent if date >= since else None


def collect(root: Path, keep: float, *, dry_run: bool = False) -> Collected:
    """Remove the files that nothing reaches, and that nobody sent for `keep` seconds.

    Copies of upstream's repos that nobody asked for as long are forgotten.

    Raises:
        BadRequest: the folder holds no repos, or is a backup; or `keep` is no time to keep files.
        UnsafeFolder: others own or may enter it.
        InUse: another gc, or a backup, is at work there.
    """
    if not 0 <= keep <= _LONGEST * _DAY:  # nor is what is not a number
        message = f"what was removed cannot be kept for {keep / _DAY:g} days"
        raise BadRequest(message, hint=f"say from 0 to {_LONGEST} days")
    refuse_backup(root)
    cutoff = time.time() - max(keep, _GRACE)
    reach = _Reach(cutoff)
    with open_root(root, alone=True) as database:
        with database.reading() as db:
            files = _list_removable(root, reach.list_kept(db), cutoff)
            copies = [f"{kind} {name}" for _, kind, name in db.execute(_UNSEEN, (int(cutoff),))]
        if not dry_run:
            files = _remove(root, database, reach, files)
    return Collected(tuple(f.name for f in files), sum(files.values()), tuple(copies))


def _list_removable(root: Path, kept: set[str], cutoff: float) -> dict[Path, int]:
    """The objects, and packed uploads, that are not kept and old enough, with their sizes."""
    found = {}
    for file in (*(root / "objects").glob("*/*"), *(root / _XORBS).glob("*")):
        if file.name not in kept and (size := _size_if_old(file, cutoff)) is not None:
            found[file] = size
    return found


def _size_if_old(file: Path, cutoff: float) -> int | None:
    with suppress(FileNotFoundError):
        stat = file.stat()
        return stat.st_size if stat.st_mtime <= cutoff else None
    return None


def _remove(
    root: Path, database: Database, reach: _Reach, files: Iterable[Path]
) -> dict[Path, int]:
    """Remove those of the files that are still not reached, with all that names them."""
    with database.writing() as db:
        db.execute(
            f"delete from repo where id in (select id from ({_UNSEEN}))", (int(reach.cutoff),)
        )
        kept = reach.list_kept(db)
        sizes = {file: _size_if_old(file, reach.cutoff) for file in files if file.name not in kept}
        gone = {file: size for file, size in sizes.items() if size is not None}
        _forget(db, {file.name for file in gone})
        for file in gone:
            file.unlink(missing_ok=True)
    return gone


def _forget(db: Connection, digests: set[str]) -> None:
    """Forget where the bytes of these files were: clients are to send them again."""
    db.executemany("delete from copied_blob where sha256 = ?", [(each,) for each in digests])
    stale = [
        xorb
        for xorb, places in db.execute("select hash, places from xorb").fetchall()
        if xorb in digests or any(source in digests for source, *_ in json.loads(places))
    ]
    if stale:
        forget_xorbs(db, stale)
