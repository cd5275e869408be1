"""What was seen of repos: where their branches and tags are, and whose signatures are good."""

from __future__ import annotations

import time
from dataclasses import astuple

from hubaoti.mirror.index import Index
from hubaoti.mirror.rows import Signed
from hubaoti.mirror.steps import FIFTH, SEVENTH


class Seen:
    """What the index remembers of repos, so that what goes back, or changes hands, is known."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def record_commit(self, endpoint: str, repo: str, name: str, commit: str) -> None:
        """Remember at which commit a branch or tag is."""
        with self._index.writing() as db:
            db.execute(
                "insert or replace into seen values (?, ?, ?, ?, ?)",
                (endpoint, repo, name, commit, time.time()),
            )

    def find_commit(self, endpoint: str, repo: str, name: str) -> str | None:
        """At which commit a branch or tag was last; None where it was never seen."""
        if not self._index.has_step(FIFTH):  # of before, and only read
            return None
        query = "select revision from seen where endpoint = ? and repo = ? and name = ?"
        found = self._index.select(query, endpoint, repo, name)
        return str(found[0][0]) if found else None

    def record_signed(self, digest: str, signed: Signed) -> None:
        """Remember whose signature of an artifact was verified, and where it lies."""
        with self._index.writing() as db:
            values = (digest, *astuple(signed), time.time())
            db.execute("insert or ignore into signed values (?, ?, ?, ?, ?, ?)", values)

    def list_signed(self, digest: str) -> tuple[Signed, ...]:
        """Whose signatures of an artifact were verified."""
        return tuple(signed for _, signed in self._read_signed("where digest = ?", digest))

    def list_all_signed(self) -> dict[str, tuple[Signed, ...]]:
        """The same of every artifact."""
        found: dict[str, tuple[Signed, ...]] = {}
        for digest, signed in self._read_signed(""):
            found[digest] = (*found.get(digest, ()), signed)
        return found

    def _read_signed(self, where: str, *values: str) -> list[tuple[str, Signed]]:
        if not self._index.has_step(SEVENTH):
            return []
        query = f"select digest, endpoint, repo, path, signer from signed {where}"
        found = (map(str, each) for each in self._index.select(query, *values))
        return [(digest, Signed(*signed)) for digest, *signed in found]
