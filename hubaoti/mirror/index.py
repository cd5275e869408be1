"""The mirror's index: which artifacts are here, where they came from, which pull gave which.

Also what is known of graphs and of sources, so that it is found out once on this host. It is
SQLite, and it never promises what the disk lacks: a row is written after its files, and removed
before them.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

from hubaoti.artifact.manifest import Manifest
from hubaoti.disk import describe_no_room
from hubaoti.errors import HubaotiError, first_line
from hubaoti.mirror.rows import LOCKED, Pin, Promise, PullOrigin, Row
from hubaoti.mirror.steps import FIFTH, NINTH, SECOND, STEPS, THIRD

KEPT = 1024  # notes, the latest
PATIENCE = 30.0  # seconds to wait for another process's transaction
_PAUSE = 0.005  # seconds between two looks, where SQLite itself does not wait

_VERSION = len(STEPS)
_COLUMNS = (str, str, str, str, int, float, str, str, str, str)  # of a row of artifacts
# What SQLite says of a damaged file; tables that are not as they were made are an error of SQL.
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
DAMAGED |= {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG}


class Index:
    """`index.sqlite3`; each method is one transaction, safe beside other processes."""

    def __init__(self, path: Path, is_writable: bool = True) -> None:
        """Open the index, or make it; one that is not writable is only read.

        Raises:
            HubaotiError: it is damaged, was written by a newer hubaoti, or cannot be written.
        """
        self._path = path
        self.is_writable = is_writable
        name = path.as_uri() + ("" if is_writable else self._read_only())
        with self._explain_errors():
            self._db = sqlite3.connect(name, timeout=PATIENCE, isolation_level=None, uri=True)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _read_only(self) -> str:
        """How SQLite is told to write nothing, not even its lock.

        It then does not look at the -wal file; where there is one, it has to.
        """
        wal = self._path.with_name(f"{self._path.name}-wal")
        has_content = wal.is_file() and wal.stat().st_size > 0
        return "?mode=ro" if has_content else "?mode=ro&immutable=1"

    def require_writable(self) -> None:
        """See that something can be stored.

        Raises:
            HubaotiError: the disk, or what it permits, is read-only.
        """
        if not self.is_writable:
            raise HubaotiError(
                f"{self._path.parent} is read-only: nothing can be stored or changed there",
                hint="set HUBAOTI_HOME to a folder that you may write; what was pulled before is "
                "found by its full commit",
            )

    def _prepare(self) -> None:
        with self._explain_errors():
            self._db.execute("pragma foreign_keys = on")
            before = self._version()
            if before == 0 or (before < _VERSION and self.is_writable):
                self._create()
            version = self._version()
        if version > _VERSION:
            raise HubaotiError(
                f"{self._path} was written by a newer hubaoti",
                hint="upgrade hubaoti on this machine",
            )

    def close(self) -> None:
        """Let go of the file; nothing can be asked of the index after that."""
        self._db.close()

    def add(self, row: Row, graphs: Iterable[str]) -> None:
        """Promise an artifact, whose files are all there; a known one keeps its row."""
        values = (row.digest, row.key, row.recipe, row.variant, row.size, row.added)
        with self._writing() as db:
            db.execute(
                "insert or ignore into artifacts values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, *astuple(row.origin)),
            )
            db.executemany(
                "insert or ignore into holds values (?, ?)",
                [(row.digest, graph) for graph in graphs],
            )
            _add_origin(db, row.digest, row.origin)

    def remove(self, *digests: str) -> list[str]:
        """Stop promising artifacts, and the pulls that gave them; graphs that none holds now."""
        with self._writing() as db:
            held, graphs = "select graph from holds where", set[str]()
            for digest in digests:
                graphs.update(str(each) for (each,) in db.execute(f"{held} digest = ?", (digest,)))
                db.execute("delete from artifacts where digest = ?", (digest,))
            return [
                each for each in graphs if not db.execute(f"{held} graph = ?", (each,)).fetchone()
            ]

    def remove_graph(self, graph: str) -> None:
        """Stop promising every artifact that holds a graph (by its package's sha256)."""
        with self._writing() as db:
            db.execute(
                "delete from artifacts where digest in (select digest from holds where graph = ?)",
                (graph,),
            )

    def read_promise(self, digest: str) -> Promise | None:
        """What is promised of an artifact; None where it is not."""
        if (row := self.row(digest)) is None:
            return None
        graphs = self._select("select graph from holds where digest = ?", digest)
        columns = "endpoint, repo, revision, asked, host, path"
        found = self._select(f"select {columns} from pulls where digest = ?", digest)
        pulls = ((Pin(*map(str, pin)), str(path)) for *pin, path in found)
        return Promise(row, tuple(str(graph) for (graph,) in graphs), tuple(pulls))

    def list_promises(self, graph: str) -> list[Promise]:
        """What is promised of every artifact that holds a graph (by its package's sha256)."""
        rows = self._read_rows("where digest in (select digest from holds where graph = ?)", graph)
        return [each for row in rows if (each := self.read_promise(row.digest))]

    def keep(self, promise: Promise) -> None:
        """Promise an artifact as it was promised before."""
        self.add(promise.row, promise.graphs)
        for pin, path in promise.pulls:
            self.record_pull(pin, promise.row.digest, path)

    def row(self, digest: str) -> Row | None:
        """The artifact's row; None when it is not promised."""
        found = self._read_rows("where digest = ?", digest)
        return found[0] if found else None

    def require_whole(self) -> None:
        """See that what it says of artifacts is what was written.

        Raises:
            HubaotiError: it is damaged.
        """
        for table in ("artifacts", "holds", *(["facts"] if self._has_step(NINTH) else [])):
            found, *_ = self._select(f"pragma integrity_check({table})")
            if found != ("ok",):
                raise self._describe_damage(str(found[0]).partition("\n")[0])

    def rows(self, key: str | None = None) -> list[Row]:
        """Every artifact, or those of one key, the newest first."""
        if key is None:
            return self._read_rows("order by added desc, digest")
        return self._read_rows("where key = ? order by added desc, digest", key)

    def record_pull(self, pin: Pin, digest: str, path: str) -> None:
        """Remember what a pull gave; forgotten together with the artifact, where from never is."""
        with self._writing() as db:
            _add_origin(db, digest, PullOrigin(pin.endpoint, pin.repo, pin.commit, path))
            db.execute(
                "insert or replace into pulls select ?, ?, ?, ?, ?, digest, ? "
                "from artifacts where digest = ?",
                (*astuple(pin), path, digest),
            )

    def find_pull(self, pin: Pin) -> tuple[str, str] | None:
        """The digest and path that this pull gave before; None when it gave none."""
        query = (
            "select digest, path from pulls where endpoint = ? and repo = ? "
            "and revision = ? and asked = ? and host = ?"
        )
        found = self._select(query, *astuple(pin))
        return (str(found[0][0]), str(found[0][1])) if found else None

    def list_pulls(self, endpoint: str, repo: str, commit: str | None = None) -> list[str]:
        """The digests that pulls from a repo gave, of one commit if it is named, the last first."""
        query = (
            "select digest from pulls where endpoint = ? and repo = ? "
            "and revision = coalesce(?, revision) order by rowid desc"
        )
        return [str(digest) for (digest,) in self._select(query, endpoint, repo, commit)]

    def is_known(self, endpoint: str, repo: str, commit: str) -> bool:
        """Whether a commit was pulled before as its owner's, and not as it was locked."""
        query = (
            "select 1 from pulls where endpoint = ? and repo = ? and revision = ? and asked != ?"
        )
        return bool(self._select(query, endpoint, repo, commit, LOCKED))

    def list_origins(self, digest: str) -> tuple[PullOrigin, ...]:
        """Every place that an artifact of this digest was ever pulled from, the first one first."""
        return tuple(origin for _, origin in self._read_origins("where digest = ?", digest))

    def list_all_origins(self) -> dict[str, tuple[PullOrigin, ...]]:
        """The same of every artifact that was ever pulled."""
        found: dict[str, tuple[PullOrigin, ...]] = {}
        for digest, origin in self._read_origins(""):
            found[digest] = (*found.get(digest, ()), origin)
        return found

    def _read_origins(self, where: str, *values: str) -> list[tuple[str, PullOrigin]]:
        table = "origins" if self._has_step(FIFTH) else "artifacts"
        query = f"select digest, endpoint, repo, revision, path from {table} {where} order by rowid"
        found = (map(str, each) for each in self._select(query, *values))
        origins = ((digest, PullOrigin(*origin)) for digest, *origin in found)
        return [each for each in origins if each[1].repo]

    def record_built(self, manifest: Manifest) -> None:
        """Remember that this machine built this artifact, so it needs no one's trust."""
        with self._writing() as db:
            db.execute(
                "insert or ignore into built values (?, ?, ?)",
                (manifest.digest, manifest.key, time.time()),
            )

    def is_built(self, digest: str) -> bool:
        """Whether this machine built the artifact of this digest."""
        return bool(self._select("select 1 from built where digest = ?", digest))

    def record_tested(self, graph: str, host: str, problem: str) -> None:
        """Remember what came of a graph, by its name, on a kind of host; nothing where it is fine.

        A problem that is known stays known, and one of what was fine before is.
        """
        with self._writing() as db:
            db.execute(
                "insert into tested values (?, ?, ?, ?) on conflict do update "
                "set problem = excluded.problem, at = excluded.at where problem = ''",
                (graph, host, problem, time.time()),
            )

    def find_problem(self, graph: str, host: str) -> str | None:
        """The problem of a graph on a kind of host, empty where it has none; None if untested."""
        if not self._has_step(SECOND):
            return None
        found = self._select("select problem from tested where graph = ? and host = ?", graph, host)
        return str(found[0][0]) if found else None

    def problems(self) -> list[tuple[str, str]]:
        """The names of graphs that are not opened here, each with what is held against it."""
        if not self._has_step(SECOND):
            return []
        query = "select graph, problem from tested where problem != '' order by at desc"
        return [(str(graph), str(problem)) for graph, problem in self._select(query)]

    def forget_problems(self) -> int:
        """Forget what is held against graphs, so that they are tried again; of how many."""
        with self._writing() as db:
            return int(db.execute("delete from tested where problem != ''").rowcount)

    def note(self, found: Mapping[str, bytes]) -> None:
        """Keep by digest what can be worked out again, if that can be at once: this never fails."""
        if not self.is_writable:
            return
        with suppress(HubaotiError), self._explain_errors():
            self._db.execute("pragma busy_timeout = 0")
            try:
                with self._writing() as db:
                    rows = [(digest, data, time.time()) for digest, data in found.items()]
                    db.executemany("insert or replace into notes values (?, ?, ?)", rows)
                    db.execute(
                        "delete from notes where at < "
                        "(select at from notes order by at desc limit 1 offset ?)",
                        (KEPT - 1,),
                    )
            finally:
                self._db.execute(f"pragma busy_timeout = {PATIENCE * 1000:.0f}")

    def read_note(self, digest: str) -> bytes | None:
        """What was kept under a digest; None where nothing was, it was forgotten, or is damaged."""
        with suppress(HubaotiError), self._explain_errors():
            if self._has_step(THIRD):
                query = "select data from notes where digest = ?"
                row = self._db.execute(query, (digest,)).fetchone()
                return None if row is None else bytes(row[0])
        return None

    def _read_rows(self, where: str, *values: str) -> list[Row]:
        columns = "digest, key, recipe, variant, size, added, endpoint, repo, revision, path"
        found = self._select(f"select {columns} from artifacts {where}", *values)
        return [self._check_row(each) for each in found]

    def _select(self, query: str, *values: str | None) -> list[tuple[Any, ...]]:
        with self._explain_errors():
            return self._db.execute(query, values).fetchall()

    def _check_row(self, found: tuple[Any, ...]) -> Row:
        """A row as it was written; of a damaged page SQLite may give values of any type."""
        if tuple(map(type, found)) != _COLUMNS:
            raise self._describe_damage("a row of artifacts is none")
        digest, key, recipe, variant, size, added, *origin = found
        return Row(digest, key, recipe, variant, size, added, PullOrigin(*origin))

    def _has_step(self, step: str) -> bool:
        """Whether it has the tables of a step: one that is only read keeps those that it has."""
        with self._explain_errors():
            return self._version() > STEPS.index(step)

    def _version(self) -> int:
        return int(self._db.execute("pragma user_version").fetchone()[0])

    def _create(self) -> None:
        self.require_writable()
        self._use_wal()
        self._db.execute("begin immediate")
        for step in STEPS[self._version() :]:  # another process may have been faster
            for statement in step.split(";"):
                self._db.execute(statement)
        self._db.execute(f"pragma user_version = {max(_VERSION, self._version())}")
        self._db.execute("commit")

    def _use_wal(self) -> None:
        """WAL where the disk allows it: SQLite answers with the mode it took, and goes on.

        Another process that opens a new index may be at it: SQLite waits for no lock here, as it
        does everywhere else, so we do.
        """
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self._db.execute("pragma journal_mode = wal")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(_PAUSE)
            else:
                return

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One change: alone from its first read to its commit, undone by any error."""
        self.require_writable()
        with self._explain_errors():
            self._db.execute("begin immediate")
            try:
                yield self._db
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("rollback")
                raise

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._describe_error(error) from error
        except UnicodeDecodeError as error:  # a column's text, or an error's that quotes it
            raise self._describe_damage("it has text that is none") from error

    # For what else is kept in this file.
    select, writing, has_step = _select, _writing, _has_step

    def _describe_error(self, error: sqlite3.Error) -> HubaotiError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return describe_no_room(self._path.parent, 0)
        if code == sqlite3.SQLITE_BUSY:
            return HubaotiError(f"{self._path} is busy", hint="another hubaoti works; try again")
        # Of Python's own module.
        undecoded = not code and isinstance(error, sqlite3.OperationalError)
        if code in DAMAGED or undecoded:
            return self._describe_damage(error)
        hint = "see that you may write it, or set HUBAOTI_HOME to another folder"
        return HubaotiError(f"{self._path}: {error}", hint=hint)

    def _describe_damage(self, error: object) -> HubaotiError:
        hint = f"make it again from the files: hubaoti mirror rebuild (or remove {self._path})"
        return HubaotiError(f"{self._path} is damaged: {first_line(str(error))!a}", hint=hint)


def _add_origin(db: sqlite3.Connection, digest: str, origin: PullOrigin) -> None:
    """Remember where an artifact was pulled from, if it was."""
    if origin.repo:
        db.execute(
            "insert or ignore into origins values (?, ?, ?, ?, ?, ?)",
            (digest, *astuple(origin), time.time()),
        )
