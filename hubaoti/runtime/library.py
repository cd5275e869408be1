"""A compiled library, loaded from the very file that was hashed, whatever has its name by then."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hubaoti.mirror.artifact import describe_changed
from hubaoti.runtime.locks import ForkSafeLock

_DESCRIPTORS = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class Library:
    """Where a library lies, beside what else its package has of it, and by what it is loaded."""

    place: Path
    file: Path

    @classmethod
    def at(cls, place: Path) -> Library:
        """One of which nobody else could have changed anything, as it was made here just now."""
        return cls(place, place)


@dataclass(frozen=True, slots=True)
class _Held:
    """An open file, and which one it is: a number may be another file's, after a wild close."""

    handle: int
    device: int
    inode: int

    @property
    def path(self) -> Path:
        return _DESCRIPTORS / str(self.handle)

    @property
    def is_open(self) -> bool:
        try:
            status = os.fstat(self.handle)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


# By the sha256 of their bytes, and all numbers that ever were theirs. The system's loader knows a
# library again by the path that it was loaded by: one of these paths never means two.
_HELD: dict[str, _Held] = {}
_USED: set[int] = set()
_LOCK = ForkSafeLock()


def hold_library(place: Path, sha256: str) -> Library:
    """A library that has these bytes, whose file stays open as long as this process.

    Raises:
        DigestMismatch: it has others. OSError: it cannot be read.
    """
    if not _DESCRIPTORS.is_dir():  # of a system without it
        return Library.at(place)
    with _LOCK:
        held = _HELD.get(sha256)
        if held is None or not held.is_open:
            held = _HELD[sha256] = _open_hashed(place, sha256)
            _USED.add(held.handle)
        return Library(place, held.path)


def name_files(message: str) -> str:
    """A message of the system's loader, with the names of the files that it calls by numbers."""
    return re.sub(rf"{_DESCRIPTORS}/\d+", lambda found: _read_name(found[0]), message)


def _read_name(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return path


def _open_hashed(place: Path, sha256: str) -> _Held:
    """Open a file for good, under a number that no library had before."""
    handle, passed = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), list[int]()
    try:
        with os.fdopen(os.dup(handle), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise describe_changed(place)
        while handle in _USED:
            passed.append(handle)
            handle = os.dup(handle)
    except BaseException:
        os.close(handle)
        raise
    finally:
        for each in passed:
            os.close(each)
    status = os.fstat(handle)
    return _Held(handle, status.st_dev, status.st_ino)
