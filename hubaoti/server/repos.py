"""Repos and their refs, as rows. Every function runs inside a transaction of its caller's."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from sqlite3 import Connection
from typing import Any

from hubaoti.server.errors import ServerError, revision_not_found
from hubaoti.server.validation import RepoId, is_commit


@dataclass(frozen=True, slots=True)
class Repo:
    """One repo: its row's number, its name, and what its card says.

    `origin` is the upstream that it was copied from, "" for one of our own.
    """

    row: int
    id: RepoId
    private: bool
    created: str
    card: dict[str, Any]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Ref:
    """A branch (`folder="heads"`) or a tag (`"tags"`)."""

    folder: str
    name: str
    oid: str


_COLUMNS = (
    "id, private, created, card, coalesce(origin, '') from repo left join copied on repo = id"
)


def now() -> str:
    """The time, as the Hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def find(db: Connection, repo: RepoId) -> Repo | None:
    """The repo of this name, None when there is none."""
    row = db.execute(
        f"select {_COLUMNS} where kind = ? and name = ?",
        (repo.kind, repo.full_name),
    ).fetchone()
    return _make_repo(repo, *row) if row else None


def find_spelled(db: Connection, name: RepoId) -> Repo | None:
    """The repo of our own of this name, in whichever letters, large or small."""
    return _find_own(db, name, "select name from repo where kind = ? and name = ? collate nocase")


def find_renamed(db: Connection, name: RepoId) -> Repo | None:
    """The repo of our own that this name leads to: it had it before, or is spelled otherwise."""
    moved = (
        "select r.name from moved m join repo r on r.id = m.repo where m.kind = ? and m.name = ?"
    )
    return find_spelled(db, name) or _find_own(db, name, moved)


def _find_own(db: Connection, name: RepoId, query: str) -> Repo | None:
    rows = db.execute(query, (name.kind, name.full_name)).fetchall()
    found = (find(db, RepoId(name.kind, *full.split("/"))) for (full,) in rows)
    return next((repo for repo in found if repo is not None and not repo.origin), None)


def list_repos(db: Connection, kind: str) -> list[Repo]:
    """All repos of a kind, by name, private ones too."""
    rows = db.execute(f"select name, {_COLUMNS} where kind = ? order by name", (kind,))
    return [_make_repo(RepoId(kind, *name.split("/")), *rest) for name, *rest in rows]


def _make_repo(name: RepoId, row: int, private: int, created: str, card: str, origin: str) -> Repo:
    return Repo(row, name, bool(private), created, json.loads(card), origin)


def create_repo(db: Connection, repo: RepoId, private: bool) -> int:
    """A new, empty repo; returns its row's number. Its name leads to no other one any more."""
    _forget_moved(db, repo)
    cursor = db.execute(
        "insert into repo (kind, name, private, created, card) values (?, ?, ?, ?, '{}')",
        (repo.kind, repo.full_name, private, now()),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def delete_repo(db: Connection, repo: Repo) -> None:
    """Forget the repo, its refs and commits; objects stay, for others may hold them too."""
    db.execute("delete from repo where id = ?", (repo.row,))


def move_repo(db: Connection, repo: Repo, to: RepoId) -> None:
    """Give the repo another name, to which the old one leads; 409 where a repo of this name is."""
    there = find(db, to) or find_spelled(db, to)
    if there is not None and there.row != repo.row:
        raise ServerError(409, f"{there.id} already exists")
    _forget_moved(db, to)
    db.execute("update repo set name = ? where id = ?", (to.full_name, repo.row))
    if find_spelled(db, repo.id) is None:
        old = (repo.id.kind, repo.id.full_name, repo.row)
        db.execute("insert or replace into moved values (?, ?, ?)", old)


def _forget_moved(db: Connection, name: RepoId) -> None:
    db.execute("delete from moved where kind = ? and name = ?", (name.kind, name.full_name))


def set_private(db: Connection, repo: Repo, private: bool) -> None:
    """Hide the repo from those without a token, or show it to all."""
    db.execute("update repo set private = ? where id = ?", (private, repo.row))


def set_card(db: Connection, repo: Repo, card: dict[str, Any]) -> None:
    """Keep what the main branch's README says of the repo."""
    db.execute("update repo set card = ? where id = ?", (json.dumps(card), repo.row))


def list_refs(db: Connection, repo: Repo) -> list[Ref]:
    """Every branch and tag of a repo, in order of their names."""
    rows = db.execute("select folder, name, oid from ref where repo = ? order by name", (repo.row,))
    return [Ref(*row) for row in rows]


def _find_ref(db: Connection, repo: Repo, folder: str, name: str) -> str | None:
    """The commit that a ref names, None when there is no such ref."""
    row = db.execute(
        "select oid from ref where repo = ? and folder = ? and name = ?", (repo.row, folder, name)
    ).fetchone()
    return str(row[0]) if row else None


def find_head(db: Connection, repo: Repo, branch: str) -> str:
    """The commit at the end of a branch."""
    oid = _find_ref(db, repo, "heads", branch)
    if oid is None:
        raise revision_not_found(branch)
    return oid


def has_main(db: Connection, repo: Repo) -> bool:
    """Whether it has a main branch, which a copy of upstream's may lack."""
    return _find_ref(db, repo, "heads", "main") is not None


def add_ref(db: Connection, repo: Repo, new: Ref, message: str = "") -> None:
    """A new branch or tag; 409 when there is one of its name."""
    if _find_ref(db, repo, new.folder, new.name) is not None:
        raise ServerError(409, f"Reference refs/{new.folder}/{new.name} already exists")
    row = (repo.row, new.folder, new.name, new.oid, message)
    db.execute("insert into ref values (?, ?, ?, ?, ?)", row)


def delete_ref(db: Connection, repo: Repo, folder: str, name: str) -> None:
    """Forget a branch or tag; its commits stay."""
    if _find_ref(db, repo, folder, name) is None:
        raise revision_not_found(name)
    if (folder, name) == ("heads", "main"):
        raise ServerError(403, "The main branch cannot be deleted")
    key = (repo.row, folder, name)
    db.execute("delete from ref where repo = ? and folder = ? and name = ?", key)


def resolve(db: Connection, repo: Repo, revision: str) -> str:
    """The commit that a branch, a tag, or (the first digits of) a commit names.

    A full commit id is looked up first, so that no ref can pose as a pinned commit.
    """
    match = re.fullmatch(r"refs/(heads|tags)/(.+)", revision, re.DOTALL)
    folders, name = ((match[1],), match[2]) if match else (("heads", "tags"), revision)
    if name.startswith("refs/"):
        raise revision_not_found(f"{revision} (only branches and tags are served, no PRs)")
    commit = _find_commit(db, repo, revision) if len(revision) == 40 else None
    for folder in folders:
        commit = commit or _find_ref(db, repo, folder, name)
    commit = commit or _find_commit(db, repo, revision)
    if commit is None:
        raise revision_not_found(revision)
    return commit


def _find_commit(db: Connection, repo: Repo, digits: str) -> str | None:
    if not is_commit(digits):
        return None
    rows = db.execute(
        "select oid from revision where repo = ? and oid >= ? and oid < ? limit 2",
        (repo.row, digits, f"{digits}g"),
    ).fetchall()
    return str(rows[0][0]) if len(rows) == 1 else None
