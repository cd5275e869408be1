"""Commits: recorded, read, squashed. What takes a `db` runs inside its caller's transaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from sqlite3 import Connection
from typing import Any

from hubaoti.server import card, repos, trees
from hubaoti.server.errors import ServerError, malformed_request
from hubaoti.server.gitids import hash_commit
from hubaoti.server.objects import Objects
from hubaoti.server.repos import Repo
from hubaoti.server.trees import Tree

Card = dict[str, Any]

_README = "README.md"
_REMEMBERED = 64
"""How many trees are kept unpacked in memory."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One commit, without its files; `date` is as the Hub writes it."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A commit that is asked for; `parent`, where given, is what its author saw last."""

    title: str
    message: str = ""
    parent: str = ""
    changes: tuple[trees.TreeChange, ...] = ()


class History:
    """Writes commits in the user's name, and reads them."""

    def __init__(self, objects: Objects, user: str) -> None:
        self._objects = objects
        self._user = user
        self._trees: dict[tuple[int, str], Tree] = {}
        self._lock = threading.Lock()

    def revision(self, db: Connection, repo: Repo, oid: str) -> Revision:
        """The commit of this id, which is one of the repo's."""
        row = db.execute(
            "select oid, parent, title, message, date from revision where repo = ? and oid = ?",
            (repo.row, oid),
        ).fetchone()
        return Revision(*row)

    def log(self, db: Connection, repo: Repo, oid: str, limit: int) -> list[Revision]:
        """A commit and those before it, newest first."""
        found: list[Revision] = []
        following: str | None = oid
        while following is not None and len(found) < limit:
            found.append(self.revision(db, repo, following))
            following = found[-1].parent
        return found

    def tree(self, db: Connection, repo: Repo, oid: str) -> Tree:
        """The commit's files. It never changes, so it is unpacked once."""
        key = (repo.row, oid)
        with self._lock:
            known = self._trees.get(key)
        if known is not None:
            return known
        row = db.execute("select tree from revision where repo = ? and oid = ?", key).fetchone()
        if not row[0]:
            return {}  # of upstream, and not listed yet
        tree = trees.load_tree(row[0])
        with self._lock:
            self._trees[key] = tree
            while len(self._trees) > _REMEMBERED:
                del self._trees[next(iter(self._trees))]
        return tree

    def card_after(self, changes: Sequence[trees.TreeChange]) -> Card | None:
        """What a repo's card says after these changes; None when they leave it as it is.

        To read one may take a second: ask before the transaction that would keep others waiting.
        """
        for change in reversed(changes):
            if isinstance(change, trees.Put) and change.path == _README:
                return self._read_card(change.entry.sha256)
            if change == trees.Delete(_README):
                return {}
        return None

    def _read_card(self, sha256: str) -> Card:
        with self._objects.path(sha256).open("rb") as file:
            text = file.read(card.CARD_LIMIT).decode("utf-8", "replace")
        try:
            return card.parse_card(text)
        except card.BadCard:
            return {}  # a broken card hides nothing else of the repo

    def commit(
        self, db: Connection, repo: Repo, branch: str, draft: Draft, new_card: Card | None
    ) -> str:
        """Add a commit to a branch; returns its id. `new_card` is the card after its changes.

        Raises:
            Problem: 404, there is no such branch; 412, it moved on since `draft.parent`.
        """
        head = repos.find_head(db, repo, branch)
        if draft.parent and not head.startswith(draft.parent):
            message = "A commit has happened since. Please refresh and try again."
            raise ServerError(412, f"{message} ({branch} is at {head}, not at {draft.parent})")
        self._require_objects(draft.changes)
        tree = trees.apply_changes(self.tree(db, repo, head), draft.changes, head)
        if branch == "main" and new_card is not None:
            repos.set_card(db, repo, new_card)
        return self._record(db, repo, branch, head, draft, tree)

    def begin(self, db: Connection, repo: Repo, changes: tuple[trees.TreeChange, ...]) -> str:
        """The first commit of a new repo, which makes its main branch."""
        self._require_objects(changes)
        tree = trees.apply_changes({}, changes, "")
        repos.set_card(db, repo, self.card_after(changes) or {})
        return self._record(db, repo, "main", None, Draft("initial commit"), tree)

    def _require_objects(self, changes: Sequence[trees.TreeChange]) -> None:
        """See, while nobody removes any, that the files are here which these changes name."""
        for change in changes:
            if isinstance(change, trees.Put) and self._objects.size(change.entry.sha256) is None:
                raise malformed_request(f"{change.path} was removed by gc meanwhile: send it again")

    def squash(self, db: Connection, repo: Repo, branch: str, title: str) -> str:
        """Put one commit of the same files in place of a branch's whole history."""
        tree = self.tree(db, repo, repos.find_head(db, repo, branch))
        anew = {path: replace(entry, since="") for path, entry in tree.items()}
        return self._record(db, repo, branch, None, Draft(title), anew)

    def _record(
        self, db: Connection, repo: Repo, branch: str, parent: str | None, draft: Draft, tree: Tree
    ) -> str:
        root, seconds = trees.hash_folders(tree)[""], int(time.time())
        oid = hash_commit(root, parent, self._user, seconds, draft.title, draft.message)
        row = (repo.row, oid, parent, draft.title, draft.message, repos.now())
        db.execute(
            "insert or ignore into revision values (?, ?, ?, ?, ?, ?, ?)",
            (*row, trees.dump_tree(tree, oid)),
        )
        db.execute(
            "insert into ref values (?, 'heads', ?, ?, '') "
            "on conflict (repo, folder, name) do update set oid = excluded.oid",
            (repo.row, branch, oid),
        )
        return oid
