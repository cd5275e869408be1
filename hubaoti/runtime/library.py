"""A compiled library, loaded from the very file that was hashed, whatever has its name by then."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hubaoti.artifact.schema import Member
from hubaoti.mirror.artifact import describe_changed
from hubaoti.runtime.locks import ForkSafeLock

_DESCRIPTORS = Path("/proc/self/fd")
_NOTES = ".json"


@dataclass(frozen=True, slots=True)
class Library:
    """Where a library lies in its package, and by what it is loaded.

    `notes` is the JSON beside it, by which torch's proxy executor calls ops without a C shim; None
    where there is none of them.
    """

    place: Path
    file: Path
    notes: bytes | None = None

    @classmethod
    def at(cls, place: Path) -> Library:
        """One of which nobody else could have changed anything, as it was made here just now."""
        notes = place.with_suffix(_NOTES)
        return cls(place, place, notes.read_bytes() if notes.exists() else None)

    @contextmanager
    def beside_notes(self) -> Iterator[Path]:
        """A path by which torch's runners load it, who look for the notes beside it meanwhile."""
        if self.notes is None or self.file == self.place:
            yield self.file
            return
        with tempfile.TemporaryDirectory(prefix="hubaoti-") as folder:
            path = Path(folder) / self.place.name
            path.symlink_to(self.file)
            path.with_suffix(_NOTES).write_bytes(self.notes)
            yield path


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


def hold_library(folder: Path, library: Member, members: Iterable[Member]) -> Library:
    """A member of a package in a folder, with the notes beside it, both as the manifest lists them.

    Its file stays open as long as this process.

    Raises:
        DigestMismatch: one has other bytes. OSError: one cannot be read.
    """
    place = folder / library.path
    notes = [_read_hashed(folder, each) for each in members if _is_notes(each, library)]
    if not _DESCRIPTORS.is_dir():  # of a system without it
        return Library(place, place, *notes)
    with _LOCK:
        held = _HELD.get(library.sha256)
        if held is None or not held.is_open:
            held = _HELD[library.sha256] = _open_hashed(place, library.sha256)
            _USED.add(held.handle)
        return Library(place, held.path, *notes)


def _is_notes(member: Member, library: Member) -> bool:
    return member.path == Path(library.path).with_suffix(_NOTES).as_posix()


def _read_hashed(folder: Path, member: Member) -> bytes:
    content = (folder / member.path).read_bytes()
    if hashlib.sha256(content).hexdigest() != member.sha256:
        raise describe_changed(folder / member.path)
    return content


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
    with ExitStack() as passed:
        handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        passed.callback(os.close, handle)
        with open(handle, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise describe_changed(place)
        while (kept := os.dup(handle)) in _USED:
            passed.callback(os.close, kept)
    status = os.fstat(kept)
    return _Held(kept, status.st_dev, status.st_ino)
