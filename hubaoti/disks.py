"""Disks that are full, closed or broken: their errors in words, and the room that they have."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubaoti.errors import DiskFull, HubaotiError

# What else can be done, by what lies on the disk.
HOME = "set HUBAOTI_HOME to a folder on a larger disk"
TEMPORARY = "set TMPDIR to a folder on a larger disk"
OUTPUT = "choose another folder with -o"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# As g++ and as Python name what could not be written.
NAMED = re.compile(r"(/[^:'\"\n]*): No space left|No space left on device: '(/[^'\n]*)'")
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def explained(folder: Path, needed: int = 0) -> Iterator[None]:
    """Around work that writes `needed` bytes below `folder`: a full or closed disk is said so.

    Raises:
        DiskFull: the disk, or the quota, has no room.
        HubaotiError: the disk may not be written, or is broken.
        FileNotFoundError: as it came: only the caller knows what is missing.
    """
    try:
        yield
    except OSError as why:
        if isinstance(why, FileNotFoundError):
            raise
        raise refused(why, folder, needed) from why


def refused(why: OSError, folder: Path, needed: int = 0) -> HubaotiError:
    """The error that says why `needed` bytes could not be written below `folder`."""
    if why.errno in FULL:
        return no_room(folder, needed)
    hint = "see that the folder and its disk are well, or set HUBAOTI_HOME to another"
    if why.errno in CLOSED:
        hint = "set HUBAOTI_HOME to a folder that you may write"
    return HubaotiError(f"cannot write {why.filename or folder}: {why.strerror}", hint=hint)


def require_room(folder: Path, needed: int, remedy: str = HOME) -> None:
    """See that `needed` more bytes go below `folder`, before any is written.

    `remedy` is what else can be done than to free some space.

    Raises:
        DiskFull: they do not.
    """
    if free_bytes(folder) < needed:
        raise no_room(folder, needed, remedy)


def no_room(folder: Path, needed: int, remedy: str = HOME) -> DiskFull:
    """The error that says how much is needed, and how much is free."""
    need = f"{mebibytes(needed)} needed, " if needed else ""
    return DiskFull(
        f"no room on the disk of {folder}: {need}{mebibytes(free_bytes(folder))} free",
        hint=f"free some space there, or {remedy}",
    )


def full_disk(why: BaseException | str, *folders: Path) -> Path:
    """The folder whose disk had no room: the one that the error names, else that with the least.

    Looked at are `folders`, and where the system, and we, put temporary files.
    """
    if named := NAMED.search(str(why)):
        place = Path(named[1] or named[2]).parent
        if place.is_dir():
            return place
    return min((*folders, Path(tempfile.gettempdir()), Path("/tmp")), key=free_bytes)


def free_bytes(folder: Path) -> int:
    """The bytes that this user may still write on the disk of a folder, existing or not."""
    return shutil.disk_usage(nearest(folder)).free


def are_together(one: Path, other: Path) -> bool:
    """Whether two folders, existing or not, are on one disk."""
    return nearest(one).stat().st_dev == nearest(other).stat().st_dev


def nearest(folder: Path) -> Path:
    """The folder, or the first one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
