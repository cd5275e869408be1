"""Files under the digest of their bytes: each is whole and verified, or absent."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from hubaoti.disk import sync_folder
from hubaoti.server.errors import disk_full, malformed_request, over_quota


class Objects:
    """The content-addressed files: `objects/<2 digits>/<sha256>`, written by way of `tmp/`."""

    def __init__(self, root: Path, limit: int | None = None) -> None:
        """Of a root's files, whose bytes together stay within the limit, where there is one."""
        self.limit = limit
        self._lock = threading.Lock()
        self._reserved, self._used = 0, limit or 0  # counted when that could be too much
        self._files = root / "objects"
        self._tmp = root / "tmp"
        self._files.mkdir(mode=0o700, exist_ok=True)
        self._tmp.mkdir(mode=0o700, exist_ok=True)
        for leftover in self._tmp.iterdir():
            leftover.unlink()

    def path(self, sha256: str) -> Path:
        """Where the object of this digest is, or would be."""
        return self._files / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """The object's size in bytes; None when it is not here."""
        with suppress(FileNotFoundError):
            return self.path(sha256).stat().st_size
        return None

    def touch(self, sha256: str) -> int | None:
        """The object's size, which is about to be named: `gc` leaves it alone for a while."""
        with suppress(FileNotFoundError):
            os.utime(self.path(sha256))
        return self.size(sha256)

    def free(self) -> int:
        """How many bytes the disk still takes."""
        room = os.statvfs(self._files)
        return room.f_bavail * room.f_frsize

    def measure(self) -> int:
        """How many bytes all objects have together."""
        sizes = 0
        for file in self._files.glob("*/*"):
            with suppress(FileNotFoundError):
                sizes += file.stat().st_size
        return sizes

    def require_room(self, size: int) -> None:
        """See that so many bytes more are allowed, and have room, before any is sent.

        Raises:
            ServerError: 507, the disk is full; 413, they are more than may be stored here.
        """
        self._settle(self._reserve(size), 0)

    def _reserve(self, size: int) -> int:
        """Keep so many bytes of what is allowed for one who writes them."""
        if size > self.free():
            raise disk_full()
        with self._lock:
            if self.limit is not None and self._used + self._reserved + size > self.limit:
                self._used = self.measure()  # of which gc may have removed some
                if self._used + self._reserved + size > self.limit:
                    raise over_quota(size, self.limit)
            self._reserved += size
        return size

    def _settle(self, reserved: int, stored: int) -> None:
        """So much of what was kept is needed no more, and so much is stored of it."""
        with self._lock:
            self._reserved -= reserved
            self._used += stored

    def put(self, content: bytes) -> str:
        """Store these bytes, unless they are here; returns their sha256, in hex."""
        sha256 = hashlib.sha256(content).hexdigest()
        if self.touch(sha256) is None:
            with self.receive(len(content)) as incoming:
                incoming.write(content)
                incoming.keep(sha256)
        return sha256

    def receive(self, size: int = 0) -> Incoming:
        """A file of so many bytes that is being written; it becomes an object when it is kept.

        Raises:
            ServerError: 507, the disk is full; 413, it is more than may be stored here.
        """
        end = partial(self._settle, self._reserve(size))
        try:
            return Incoming(self._tmp / secrets.token_hex(16), self, end)
        except OSError:
            end(0)
            raise


class Incoming:
    """A temporary file, hashed while it is written; gone at the block's end unless kept."""

    def __init__(self, path: Path, objects: Objects, end: Callable[[int], None]) -> None:
        self._path = path
        self._end, self._stored = end, 0
        self._objects = objects
        self._hash = hashlib.sha256()
        self._file = path.open("xb")
        self.size = 0

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.close()  # which fails when its last bytes find no room
        finally:
            self._path.unlink(missing_ok=True)
            self._end(self._stored)

    def write(self, content: bytes) -> None:
        """Append these bytes, and hash them, so that `keep` can compare."""
        self._hash.update(content)
        self._file.write(content)
        self.size += len(content)

    def reread(self) -> BinaryIO:
        """What was written so far, to be read; whoever asks closes it."""
        self._file.flush()
        return self._path.open("rb")

    def keep(self, expected: str | None) -> str:
        """Make it an object; returns its digest.

        Raises:
            Problem: 400, the bytes are not those of the expected digest.
        """
        found = self._hash.hexdigest()
        if expected is not None and found != expected:
            raise malformed_request(f"SHA-256 mismatch: expected {expected}, received {found}")
        self._stored = 0 if self._objects.size(found) is not None else self.size
        self.move_to(self._objects.path(found))
        return found

    def move_to(self, path: Path) -> None:
        """Put the file there, whole: flushed to the disk first, then renamed."""
        self._file.flush()
        os.fchmod(self._file.fileno(), 0o400)
        os.fsync(self._file.fileno())
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(path.parent.parent)
        self._path.replace(path)
        sync_folder(path.parent)
