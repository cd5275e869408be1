"""What upstream has, copied when it is asked for: refs, trees and logs into rows, files as objects.

Whoever asks for the same at once waits for one request. What was copied is answered for as it was
seen last where upstream is gone; our own repos are never asked for there.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from sqlite3 import Connection
from typing import Any, TypeVar

from hubaoti.server import repos, trees
from hubaoti.server.database import Database
from hubaoti.server.errors import ServerError, entry_not_found
from hubaoti.server.fetch import Fetch
from hubaoti.server.objects import Objects
from hubaoti.server.repos import Repo
from hubaoti.server.trees import TreeEntry
from hubaoti.server.upstream import (
    Upstream,
    UpstreamGone,
    UpstreamMissing,
    UpstreamOdd,
    UpstreamRepo,
)
from hubaoti.server.validation import KINDS, RepoId

FRESH = 5.0
"""Seconds for which a repo's refs count as they were seen."""

RETRY = 10.0
"""Seconds after which an upstream that was gone is asked again."""

_SEEN = 3600.0
"""Seconds after which it is written down again that a repo is asked for: `gc` forgets by it."""

_LOCKS = 64
_MOST_MISSING = 10_000
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Moved(Exception):
    """Upstream has the repo under another name, `to`."""

    def __init__(self, to: str) -> None:
        super().__init__(to)
        self.to = to


class NotHere(Exception):
    """Upstream is gone, and what was asked for was never copied."""


class PullThrough:
    """Copies what is asked for; `counts` says how often that was here, or had to be fetched."""

    def __init__(self, upstream: Upstream, database: Database, objects: Objects) -> None:
        self.upstream = upstream
        self.counts: Counter[str] = Counter()
        self.shadows: set[RepoId] = set()
        self._database, self._objects = database, objects
        self._asking = ThreadPoolExecutor(8, "upstream")
        self._fetching = ThreadPoolExecutor(16, "fetch")
        self._lock = threading.Lock()
        self._jobs: dict[Hashable, Future[Any]] = {}
        self._fetches: dict[str, Fetch] = {}
        self._stopped = threading.Event()
        # One for each repo would be as many as names that anybody asks for.
        self._repo_locks = [threading.Lock() for _ in range(_LOCKS)]
        self._missing: dict[RepoId, float] = {}
        self._fresh: dict[RepoId, float] = {}
        self._gone_until = 0.0

    def close(self) -> None:
        """End what is on its way; nothing else is begun."""
        self._stopped.set()
        for pool in (self._asking, self._fetching):
            pool.shutdown(cancel_futures=True)

    def bring(self, name: RepoId, revision: str, what: str) -> Future[None]:
        """See that a repo is as upstream has it, with a revision's `tree` or `log`, or its `refs`.

        Raises, by what it returns:
            Moved, UpstreamMissing, NotHere
        """
        return self._join((name, revision, what), lambda: self._bring(name, revision, what))

    def _join(self, key: Hashable, job: Callable[[], _T]) -> Future[_T]:
        """The job of this key that runs already, or this one."""
        with self._lock:
            running = self._jobs.get(key)
            if running is None:
                running = self._jobs[key] = self._asking.submit(job)
                running.add_done_callback(lambda _: self._jobs.pop(key, None))
        return running

    def search(self, kind: str, query: str) -> Future[list[dict[str, Any]]]:
        """What upstream's list of a kind of repos says to a query; nothing where it is gone."""
        return self._join(("search", kind, query), lambda: self._search(kind, query))

    def _search(self, kind: str, query: str) -> list[dict[str, Any]]:
        with suppress(UpstreamGone, UpstreamMissing):
            return self._ask(lambda: self.upstream.search(kind, query))
        return []

    def _bring(self, name: RepoId, revision: str, what: str) -> None:
        with self._repo_locks[hash(name) % _LOCKS]:
            repo = self._find(name)
            if repo is not None and repo.origin != self.upstream.url:
                return
            if not (repo and self._is_copied(repo, revision)):
                repo = self._refresh(name, repo)
            if repo is not None and what != "refs":
                self._bring_commit(repo, revision, what)

    def _find(self, name: RepoId) -> Repo | None:
        with self._database.reading() as db:
            return repos.find(db, name)

    def _is_copied(self, repo: Repo, revision: str) -> bool:
        """Whether this is the full id of a commit that is here, which nothing can change."""
        with self._database.reading() as db:
            return len(revision) == 40 and _has_commit(db, repo, revision)

    def _refresh(self, name: RepoId, repo: Repo | None) -> Repo | None:
        """The repo with its refs as they are now, or as last seen; None where there is none."""
        if repo and time.monotonic() - self._fresh.get(name, -FRESH) < FRESH:
            return repo
        if repo is None and time.monotonic() - self._missing.get(name, -FRESH) < FRESH:
            return None
        try:
            seen = self._ask(lambda: self.upstream.describe(name))
        except UpstreamMissing:
            if repo is None:
                self._remember_missing(name)
                return None
            raise
        except UpstreamGone as error:
            if repo is None:
                raise NotHere(str(error)) from error
            return repo
        if seen.name != name.full_name:
            raise Moved(seen.name)
        self._record(name, seen)
        self._fresh[name] = time.monotonic()
        return self._find(name)

    def count(self, what: str, number: int = 1) -> None:
        """Have it known that this happened so often more."""
        with self._lock:
            self.counts[what] += number

    def _remember_missing(self, name: RepoId) -> None:
        if len(self._missing) >= _MOST_MISSING:
            self._missing.clear()
        self._missing[name] = time.monotonic()

    def _ask(self, question: Callable[[], _T]) -> _T:
        """What upstream answers; while it is gone, it is not asked at every turn.

        Raises:
            UpstreamMissing, UpstreamGone
        """
        if time.monotonic() < self._gone_until:
            raise UpstreamGone("it could not be asked a moment ago")
        self.count("asked")
        try:
            return question()
        except UpstreamGone as error:
            self.count("gone")
            if not isinstance(error, UpstreamOdd):
                self._gone_until = time.monotonic() + RETRY
            raise

    def _record(self, name: RepoId, seen: UpstreamRepo) -> None:
        """Write down what was seen of a repo, where it is not what was known."""
        with self._database.reading() as db:
            repo = repos.find(db, name)
            if repo is not None and self._is_known(db, repo, seen):
                return
        with self._database.writing() as db:
            repo = repos.find(db, name)
            row = repo.row if repo else repos.create_repo(db, name, seen.private)
            if repo is not None and repo.origin != self.upstream.url:
                return  # made here meanwhile
            db.execute(
                "insert or replace into copied values (?, ?, ?)",
                (row, self.upstream.url, int(time.time())),
            )
            created = seen.created or repos.now()
            repo = Repo(row, name, seen.private, created, seen.card, self.upstream.url)
            repos.set_private(db, repo, seen.private)
            repos.set_card(db, repo, seen.card)
            db.execute("update repo set created = ? where id = ?", (repo.created, row))
            db.execute("delete from ref where repo = ?", (row,))
            for ref in seen.refs:
                repos.add_ref(db, repo, ref)
                _add_commit(db, repo, (ref.oid, "", "", seen.date or repos.now()))

    def _is_known(self, db: Connection, repo: Repo, seen: UpstreamRepo) -> bool:
        (when,) = db.execute("select seen from copied where repo = ?", (repo.row,)).fetchone()
        refs = sorted(repos.list_refs(db, repo), key=lambda ref: (ref.folder, ref.name))
        known = (repo.private, repo.card, tuple(refs))
        return known == (seen.private, seen.card, seen.refs) and time.time() - when < _SEEN

    def _bring_commit(self, repo: Repo, revision: str, what: str) -> None:
        """See that the files, or the ancestors, of a revision are here."""
        oid = self._resolve(repo, revision)
        if oid is None:
            return  # and the view says so
        with self._database.reading() as db:
            table = "revision" if what == "tree" else "logged"
            whole = " and length(tree) > 0" if what == "tree" else ""
            query = f"select 1 from {table} where repo = ? and oid = ?{whole}"
            if db.execute(query, (repo.row, oid)).fetchone():
                return
        bring = self._bring_tree if what == "tree" else self._bring_log
        try:
            bring(repo, oid)
        except UpstreamGone as error:
            raise NotHere(str(error)) from error

    def _resolve(self, repo: Repo, revision: str) -> str | None:
        """The commit that a revision names, which may be one that nobody asked for before."""
        try:
            with self._database.reading() as db:
                return repos.resolve(db, repo, revision)
        except ServerError:
            if not _COMMIT.fullmatch(revision):
                return None
        try:
            oid = self._ask(lambda: self.upstream.find_commit(repo.id, revision))
        except UpstreamMissing:
            return None
        except UpstreamGone as error:
            raise NotHere(str(error)) from error
        with self._database.writing() as db:
            _add_commit(db, repo, (oid, "", "", repo.created))
        return oid

    def _bring_tree(self, repo: Repo, oid: str) -> None:
        files = self._ask(lambda: self.upstream.list_files(repo.id, oid))
        row = trees.dump_tree(files, oid)
        with self._database.writing() as db:
            db.execute(
                "update revision set tree = ? where repo = ? and oid = ?", (row, repo.row, oid)
            )

    def _bring_log(self, repo: Repo, oid: str) -> None:
        commits = self._ask(lambda: self.upstream.list_commits(repo.id, oid))
        with self._database.writing() as db:
            parents = [commit[0] for commit in commits[1:]]
            for commit, parent in zip(commits, [*parents, None], strict=True):
                _add_commit(db, repo, commit)
                db.execute(
                    "update revision set parent = ?, title = ?, message = ?, date = ? "
                    "where repo = ? and oid = ?",
                    (parent, *commit[1:], repo.row, commit[0]),
                )
                db.execute("insert or ignore into logged values (?, ?)", (repo.row, commit[0]))

    def find_object(self, entry: TreeEntry) -> str | None:
        """The digest of a file that is here, None where it has to be fetched."""
        return find_object(self._database, self._objects, entry)

    def fetch(self, repo: Repo, commit: str, path: str, entry: TreeEntry) -> Fetch:
        """A file that is not here, on its way: the one fetch that there is of its bytes."""
        key = entry.sha256 or entry.blob
        with self._lock:
            fetch = self._fetches.get(key)
            if fetch is None:
                fetch = self._fetches[key] = Fetch(entry, self._stopped)
                self._fetching.submit(self._fetch, key, fetch, (repo.id, commit, path))
        return fetch

    def _fetch(self, key: str, fetch: Fetch, where: tuple[RepoId, str, str]) -> None:
        entry = fetch.entry
        try:
            sha256 = self.find_object(entry)  # by a fetch that ended a moment ago
            if sha256 is None:
                self.count("misses")
                sha256, size = fetch.run(self.upstream, self._objects, where)
                self.count("bytes", size)
                if not entry.sha256:
                    with self._database.writing() as db:
                        row = (entry.blob, sha256)
                        db.execute("insert or replace into copied_blob values (?, ?)", row)
        except UpstreamMissing:
            fetch.done.set_exception(entry_not_found(where[2], where[1]))
        except BaseException as error:
            fetch.done.set_exception(error)
        else:
            fetch.done.set_result(sha256)
        finally:
            with self._lock:
                self._fetches.pop(key, None)

    def require_free(self, name: RepoId) -> None:
        """See that a new repo of ours hides none of upstream's.

        Where upstream cannot be asked it is made, and said at the next start.

        Raises:
            ServerError: 409, upstream has one of this name.
        """
        try:
            there = self._ask(lambda: self.upstream.has(name))
        except UpstreamGone:
            return
        if there:
            words = f"exists at {self.upstream.url}, which one here would hide: name it otherwise"
            raise ServerError(409, f"{name} {words}")

    def look_for_shadows(self) -> Future[None]:
        """Say, as soon as upstream is asked, which of our own repos hide one of its."""
        return self._asking.submit(self._find_shadows)

    def _find_shadows(self) -> None:
        with self._database.reading() as db:
            listed = [repo for kind in KINDS.values() for repo in repos.list_repos(db, kind)]
        with suppress(UpstreamGone):
            for repo in listed:
                if not repo.origin and self._ask(partial(self.upstream.has, repo.id)):
                    self.shadows.add(repo.id)
                    _log.warning("%s is served from here: it hides upstream's", repo.id)


def find_object(database: Database, objects: Objects, entry: TreeEntry) -> str | None:
    """The digest of a file's bytes, None where they are not here."""
    if entry.size == 0:
        return objects.put(b"")  # which clients do not ask for, so that it was never fetched
    sha256 = entry.sha256
    if not sha256:
        with database.reading() as db:
            query = "select sha256 from copied_blob where oid = ?"
            row = db.execute(query, (entry.blob,)).fetchone()
        sha256 = row[0] if row else ""
    return sha256 if sha256 and objects.size(sha256) is not None else None


def _has_commit(db: Connection, repo: Repo, oid: str) -> bool:
    query = "select 1 from revision where repo = ? and oid = ?"
    return db.execute(query, (repo.row, oid)).fetchone() is not None


def _add_commit(db: Connection, repo: Repo, commit: tuple[str, str, str, str]) -> None:
    oid, title, message, date = commit
    db.execute(
        "insert or ignore into revision values (?, ?, null, ?, ?, ?, x'')",
        (repo.row, oid, title, message, date),
    )
