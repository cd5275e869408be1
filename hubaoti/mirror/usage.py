"""How often artifacts were opened, when, and what getting them took; who pinned and pushed them.

What is remembered of an artifact stays when it has left, so that it is known when it comes back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hubaoti.disk import read_small
from hubaoti.errors import HubaotiError
from hubaoti.mirror.index import PATIENCE, Index
from hubaoti.mirror.rows import PullOrigin
from hubaoti.mirror.steps import SIXTH

_HASTE = 50  # milliseconds that a small note waits for another process
_AGE = "age"
_LARGEST_HOLDER = 16 << 20  # bytes of a lockfile


@dataclass(frozen=True, slots=True)
class Use:
    """How often an artifact was opened, when last (Unix seconds), the mirror's age then.

    `seconds` is what its download took; 0 where nobody knows.
    """

    opens: int = 0
    last: float = 0.0
    age: float = 0.0
    seconds: float = 0.0


class Usage:
    """What the index remembers of artifacts beyond what lies here."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def record_open(self, digest: str) -> None:
        """Count an open, if that can be at once: this never fails."""
        self.jot(
            "insert into usage select ?1, 1, ?2, coalesce(max(value), 0), 0 from numbers "
            "where name = ?3 on conflict do update set opens = opens + 1, last = excluded.last, "
            "age = excluded.age",
            (digest, time.time(), _AGE),
        )

    def record_download(self, digest: str, seconds: float) -> None:
        """Remember how long a download took; else as `record_open`, though it is none."""
        self.jot(
            "insert into usage select ?1, 0, ?2, coalesce(max(value), 0), ?4 from numbers "
            "where name = ?3 on conflict do update set last = excluded.last, age = excluded.age, "
            "seconds = excluded.seconds",
            (digest, time.time(), _AGE, seconds),
        )

    def read(self) -> dict[str, Use]:
        """What is known of each artifact that was ever opened or downloaded here."""
        if not self._index.has_step(SIXTH):
            return {}
        found = self._index.select("select digest, opens, last, age, seconds from usage")
        return {str(digest): Use(*values) for digest, *values in found}

    def read_age(self) -> float:
        """The mirror's age: the worth of the best that ever had to leave it."""
        return self.read_number(_AGE) or 0.0

    def record_age(self, age: float) -> None:
        """Remember the mirror's age, which never goes back."""
        if age > self.read_age():
            self.record_number(_AGE, age)

    def read_number(self, name: str) -> float | None:
        """A number that is kept under a name; None where none is."""
        if not self._index.has_step(SIXTH):
            return None
        found = self._index.select("select value from numbers where name = ?", name)
        return float(found[0][0]) if found else None

    def record_number(self, name: str, value: float | None) -> None:
        """Keep a number under a name; None forgets it."""
        with self._index.writing() as db:
            db.execute("delete from numbers where name = ?", (name,))
            if value is not None:
                db.execute("insert into numbers values (?, ?)", (name, value))

    def pin(self, digest: str, holder: str = "") -> None:
        """Have an artifact stay: for its user's sake, or while the file `holder` names it."""
        with self._index.writing() as db:
            db.execute("insert or ignore into pins values (?, ?, ?)", (digest, holder, time.time()))

    def unpin(self, digest: str, holder: str = "") -> bool:
        """Let go of what was pinned; whether it was."""
        with self._index.writing() as db:
            values = (digest, holder)
            found = db.execute("delete from pins where digest = ? and holder = ?", values)
            return found.rowcount > 0

    def list_pins(self) -> dict[str, list[str]]:
        """The artifacts that stay, each with the files that want it so; a user's wish is no file.

        A file that is gone wants nothing any more, nor what it does not name any more.
        """
        if not self._index.has_step(SIXTH):
            return {}
        pins: dict[str, list[str]] = {}
        texts: dict[str, str | None] = {"": None}
        for digest, holder in self._index.select("select digest, holder from pins order by at"):
            if holder not in texts:
                texts[holder] = _read_holder(Path(holder))
            text = texts[holder]
            if text is None or digest in text:
                pins.setdefault(digest, []).append(holder)
        return pins

    def record_pushed(self, digests: Iterable[str], where: PullOrigin) -> None:
        """Remember that artifacts can be had from a repo, which they were pushed to."""
        with self._index.writing() as db:
            values = (where.endpoint, where.repo, where.commit, time.time())
            rows = [(digest, *values) for digest in digests]
            db.executemany("insert or replace into pushed values (?, ?, ?, ?, ?)", rows)

    def list_pushed(self) -> dict[str, tuple[str, str]]:
        """The artifacts that were pushed, with the repo and the commit of the last push."""
        if not self._index.has_step(SIXTH):
            return {}
        found = self._index.select("select digest, repo, revision from pushed order by at")
        return {str(digest): (str(repo), str(commit)) for digest, repo, commit in found}

    def list_elsewhere(self) -> set[str]:
        """The artifacts that can be had again: those that were pulled, and those pushed."""
        if not self._index.has_step(SIXTH):
            return set()
        found = self._index.select("select digest from origins union select digest from pushed")
        return {str(digest) for (digest,) in found}

    def count_bytes(self) -> int:
        """The bytes of all artifacts; what two of them share counts twice."""
        return int(self._index.select("select coalesce(sum(size), 0) from artifacts")[0][0])

    def list_built(self) -> set[str]:
        """The artifacts that this machine built."""
        return {str(digest) for (digest,) in self._index.select("select digest from built")}

    def jot(self, statement: str, *rows: tuple[object, ...]) -> None:
        """Change rows if that can be at once, and may be lost in a power cut: this never fails."""
        if not self._index.is_writable:
            return
        with suppress(HubaotiError):
            self._index.select(f"pragma busy_timeout = {_HASTE}")
            self._index.select("pragma synchronous = normal")
            try:
                with self._index.writing() as db:
                    db.executemany(statement, rows)
            finally:
                self._index.select("pragma synchronous = full")
                self._index.select(f"pragma busy_timeout = {PATIENCE * 1000:.0f}")


def name_holders(holders: Iterable[str]) -> tuple[str, ...]:
    """Who pinned an artifact: the user by the command that did it, files by their paths."""
    return tuple(each or "hubaoti mirror pin" for each in holders)


def _read_holder(holder: Path) -> str | None:
    """What a file says, nothing where it is gone; None if it cannot be read, and may name all."""
    try:
        return read_small(holder, _LARGEST_HOLDER).decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError:
        return None
