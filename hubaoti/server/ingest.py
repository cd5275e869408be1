"""Xet uploads, taken apart: xorbs come in, plain objects come out, each under its SHA-256.

A client sends xorbs (packs of chunks), then a shard that says which chunks make which file. The
file is put together at once and its digest checked, so downloads need no Xet. The client remembers
which xorbs it sent and never sends them again, so for every chunk we remember a place: first in
the raw xorb, then in a plain object; when all chunks of a xorb have moved, the raw file goes.

Nothing is believed: a xorb's hash and a file's SHA-256 are both made again from the bytes. For the
client's memory is tied to the upload's URL, that URL holds an epoch, drawn once for each root.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from sqlite3 import Connection

from hubaoti.server.database import Database
from hubaoti.server.errors import ServerError
from hubaoti.server.objects import Incoming, Objects
from hubaoti.server.xet import (
    BadXet,
    Segment,
    XetFile,
    hash_chunk,
    hash_leaves,
    read_chunk,
    read_chunks,
    read_files,
)

_RAW = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chunk's bytes are: in an object, or, still packed, in their own raw xorb."""

    source: str
    offset: int
    length: int


class Ingest:
    """Takes Xet uploads; shards are worked on one at a time."""

    def __init__(self, root: Path, database: Database, objects: Objects) -> None:
        self._raw = root / "xorbs"
        self._raw.mkdir(mode=0o700, exist_ok=True)
        self._database = database
        self._objects = objects
        self._lock = threading.Lock()
        self._sweep()

    def _sweep(self) -> None:
        """Remove raw xorbs that nobody needs: what a killed process had no time to."""
        for file in self._raw.iterdir():
            places = self._find_places(file.name)
            if places is None or _are_moved(places):
                file.unlink()

    def keep_xorb(self, xorb: str, incoming: Incoming) -> bool:
        """Store an uploaded xorb; False when files were made of it before.

        Until then the newest upload counts: one that the disk spoilt does not stay.

        Raises:
            BadXet: it is malformed, or its hash is another one.
        """
        with incoming.reread() as file:
            chunks = read_chunks(file, incoming.size)
            found = hash_leaves(hash_chunk(read_chunk(file, chunk.offset)) for chunk in chunks)
        if found != xorb:
            raise BadXet(f"xorb hash mismatch: expected {xorb}, received {found}")
        with self._lock:
            if _are_any_moved(self._find_places(xorb) or []):
                return False
            incoming.move_to(self._raw / xorb)
            self._remember({xorb: [_Place(_RAW, chunk.offset, chunk.length) for chunk in chunks]})
        return True

    def assemble(self, shard: bytes) -> None:
        """Make objects of the files that a shard describes.

        Raises:
            BadXet: the shard is malformed, or names chunks that never came.
            Problem: 400, a file's SHA-256 is not the one that the shard names; 507, no room.
        """
        files = list(read_files(shard))
        with self._lock:
            for file in files:
                self._assemble(file)

    def _assemble(self, file: XetFile) -> None:
        places = {xorb: self._require_places(xorb) for xorb in {s.xorb for s in file.segments}}
        for segment in file.segments:
            _check_segment(segment, places[segment.xorb])
        if self._is_done(file, places):
            return
        try:
            self._remember(self._write(file, places))
        except ServerError as error:
            if error.code == "OverQuota":
                self._drop({xorb for xorb, known in places.items() if not _are_any_moved(known)})
            raise
        for xorb, known in places.items():
            if _are_moved(known):
                (self._raw / xorb).unlink(missing_ok=True)

    def _drop(self, xorbs: set[str]) -> None:
        """Remove packed uploads of which nothing came; whoever wants them sends them again."""
        with self._database.writing() as db:
            forget_xorbs(db, xorbs)
        for xorb in xorbs:
            (self._raw / xorb).unlink(missing_ok=True)

    def _is_done(self, file: XetFile, places: dict[str, list[_Place]]) -> bool:
        """Whether this upload came before: a client repeats one whose answer it missed."""
        here = file.sha256 is not None and self._objects.touch(file.sha256) is not None
        return here and all(_are_moved(known) for known in places.values())

    def _write(self, file: XetFile, places: dict[str, list[_Place]]) -> dict[str, list[_Place]]:
        """Write the file; returns the places, changed to where its chunks are now."""
        found: list[tuple[str, int, _Place]] = []
        with self._objects.receive(sum(each.length for each in file.segments)) as incoming:
            for segment in file.segments:
                for index in range(segment.first, segment.last):
                    content = self._read_place(segment.xorb, places[segment.xorb][index])
                    found.append((segment.xorb, index, _Place("", incoming.size, len(content))))
                    incoming.write(content)
            sha256 = incoming.keep(file.sha256)
        for xorb, index, place in found:
            places[xorb][index] = replace(place, source=sha256)
        return places

    def _read_place(self, xorb: str, place: _Place) -> bytes:
        """The unpacked bytes of the chunk at a place of a xorb."""
        is_raw = place.source == _RAW
        path = self._raw / xorb if is_raw else self._objects.path(place.source)
        try:
            with path.open("rb") as file:
                if is_raw:
                    return read_chunk(file, place.offset)
                file.seek(place.offset)
                return file.read(place.length)
        except FileNotFoundError:
            with self._database.writing() as db:
                forget_xorbs(db, [xorb])
            raise BadXet(f"gc removed the xorb {xorb} meanwhile: upload it again") from None

    def _require_places(self, xorb: str) -> list[_Place]:
        places = self._find_places(xorb)
        if places is None:
            raise BadXet(f"the shard names a xorb that was not uploaded: {xorb}")
        return places

    def _find_places(self, xorb: str) -> list[_Place] | None:
        with self._database.reading() as db:
            row = db.execute("select places from xorb where hash = ?", (xorb,)).fetchone()
        return [_Place(*place) for place in json.loads(row[0])] if row else None

    def _remember(self, places: dict[str, list[_Place]]) -> None:
        rows = [(xorb, json.dumps([astuple(p) for p in held])) for xorb, held in places.items()]
        with self._database.writing() as db:
            db.executemany("insert or replace into xorb values (?, ?)", rows)


def forget_xorbs(db: Connection, xorbs: Iterable[str]) -> None:
    """Forget where the chunks of these are; clients, who remember what they sent, send it again.

    For that the epoch counts on; uploads that began before end by the one that they know.
    """
    db.executemany("delete from xorb where hash = ?", [(xorb,) for xorb in xorbs])
    db.execute(
        "insert into meta values ('forgotten', '1') "
        "on conflict (key) do update set value = cast(value as integer) + 1"
    )


def _check_segment(segment: Segment, places: list[_Place]) -> None:
    if not segment.first < segment.last <= len(places):
        raise BadXet("the shard names chunks that its xorb does not have")
    length = sum(place.length for place in places[segment.first : segment.last])
    if length != segment.length:
        raise BadXet("the shard names another length than its chunks have")


def _are_any_moved(places: list[_Place]) -> bool:
    return any(place.source != _RAW for place in places)


def _are_moved(places: list[_Place]) -> bool:
    return all(place.source != _RAW for place in places)
