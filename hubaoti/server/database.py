"""The SQLite file: repos, refs, commits, xorbs. A transaction happens whole or not at all.

Of a repo that was copied from upstream, a commit whose files were not listed yet has an empty tree,
and `logged` are the commits whose ancestors are all here. `moved` are names that repos had before.
"""

from __future__ import annotations

import queue
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SCHEMA = """
pragma journal_mode = wal;
begin immediate;
create table if not exists meta (key text primary key, value text not null);
create table if not exists repo (
    id integer primary key autoincrement,
    kind text not null, name text not null,
    private integer not null, created text not null, card text not null,
    unique (kind, name)
);
create table if not exists ref (
    repo integer not null references repo on delete cascade,
    folder text not null check (folder in ('heads', 'tags')),
    name text not null, oid text not null, message text not null,
    primary key (repo, folder, name)
);
create table if not exists revision (
    repo integer not null references repo on delete cascade,
    oid text not null, parent text, title text not null, message text not null,
    date text not null, tree blob not null,
    primary key (repo, oid)
);
create table if not exists xorb (hash text primary key, places text not null);
create table if not exists token (
    name text primary key, hash text not null, role text not null, owners text not null,
    created text not null
);
create table if not exists hit (
    repo integer primary key references repo on delete cascade, count integer not null
);
create table if not exists copied (
    repo integer primary key references repo on delete cascade,
    origin text not null, seen integer not null
);
create table if not exists logged (
    repo integer not null references repo on delete cascade, oid text not null,
    primary key (repo, oid)
);
create table if not exists moved (
    kind text not null, name text not null collate nocase,
    repo integer not null references repo on delete cascade,
    primary key (kind, name)
);
create index if not exists repo_spelled on repo (kind, name collate nocase);
create table if not exists copied_blob (oid text primary key, sha256 text not null);
commit;
"""


class Database:
    """A pool of connections; each transaction has one to itself, in whatever thread it runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        self._idle: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        try:
            with self._connection() as db:
                db.executescript(_SCHEMA)
        except sqlite3.Error:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view, which no writer disturbs."""
        with self._connection() as db:
            db.execute("begin")
            try:
                yield db
            finally:
                db.execute("rollback")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One change: alone from its first read to its commit, undone by any error."""
        with self._connection() as db:
            db.execute("begin immediate")
            try:
                yield db
                db.execute("commit")
            except BaseException:
                if db.in_transaction:
                    db.execute("rollback")
                raise

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            db = self._idle.get_nowait()
        except queue.Empty:
            db = self._open()
        try:
            yield db
        finally:
            self._idle.put(db)
            if self._closed:
                self.close()

    def _open(self) -> sqlite3.Connection:
        # Each connection is used by one thread at a time, though not always by the same one.
        db = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
        db.execute("pragma foreign_keys = on")
        db.execute("pragma synchronous = full")
        return db

    def constant(self, key: str, value: str) -> str:
        """The value first stored under this key: this one, unless there was one before."""
        with self.writing() as db:
            db.execute("insert or ignore into meta values (?, ?)", (key, value))
            row = db.execute("select value from meta where key = ?", (key,)).fetchone()
        return str(row[0])

    def close(self) -> None:
        """Close every connection: the idle ones now, a busy one at its transaction's end."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()
