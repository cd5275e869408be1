"""Files under the digest of their bytes: each is whole and verified, or absent."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from hubaoti.disk import sync_folder
from hubaoti.server.errors import malformed_request


class Objects:
    """The content-addressed files: `objects/<2 digits>/<sha256>`, written by way of `tmp/`."""

    def __init__(self, root: Path) -> None:
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

    def free(self) -> int:
        """How many bytes the disk still takes."""
        room = os.statvfs(self._files)
        return room.f_bavail * room.f_frsize

    def put(self, content: bytes) -> str:
        """Store these bytes, unless they are here; returns their sha256, in hex."""
        sha256 = hashlib.sha256(content).hexdigest()
        if self.size(sha256) is None:
            with self.receive() as incoming:
                incoming.write(content)
                incoming.keep(sha256)
        return sha256

    def receive(self) -> Incoming:
        """A file that is being written; it becomes an object when it is kept."""
        return Incoming(self._tmp / secrets.token_hex(16), self)


class Incoming:
    """A temporary file, hashed while it is written; gone at the block's end unless kept."""

    def __init__(self, path: Path, objects: Objects) -> None:
        self._path = path
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
