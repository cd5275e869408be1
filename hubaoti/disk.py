"""Disks that are full, closed, broken or without code: their errors in words, and their room.

And files that cannot be read: one that is not there is another thing than one that a broken disk,
or a process with too many files open, does not give.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path

from hubaoti.errors import CannotOpen, DiskFull, HubaotiError

# What else can be done, by what lies on the disk.
_HOME = "set HUBAOTI_HOME to a folder on a larger disk"
TEMPORARY = "set TMPDIR to a folder on a larger disk"
OUTPUT = "choose another folder with -o"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# As g++ and as Python name what could not be written.
_NAMED = re.compile(r"(/[^:'\"\n]*): No space left|No space left on device: '(/[^'\n]*)'")
DISK_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
# What says that there is no such file, or that a link, a folder or a socket has its name.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EISDIR}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


@contextmanager
def explain_disk_errors(folder: Path, needed: int = 0, remedy: str | None = None) -> Iterator[None]:
    """Around work that writes `needed` bytes below `folder`: a full or closed disk is said so.

    `remedy` is how another place is named, where it is not HUBAOTI_HOME that does.

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
        raise describe_disk_error(why, folder, needed, remedy) from why


def describe_disk_error(
    why: OSError, folder: Path, needed: int = 0, remedy: str | None = None
) -> HubaotiError:
    """The error that says why `needed` bytes could not be written below `folder`."""
    if why.errno in DISK_FULL:
        return describe_no_room(folder, needed, remedy or _HOME)
    hint = "see that the folder and its disk are well, or set HUBAOTI_HOME to another"
    if why.errno in DISK_CLOSED:
        hint = "set HUBAOTI_HOME to a folder that you may write"
    message = f"cannot write {why.filename or folder}: {why.strerror}"
    return HubaotiError(message, hint=remedy or hint)


@contextmanager
def explain_unread(path: Path) -> Iterator[None]:
    """Around work that looks at a file, or at what lies below a folder.

    Raises:
        FileNotFoundError: there is none.
        HubaotiError: it could not be looked at, which says nothing of what is in it.
    """
    try:
        yield
    except OSError as why:
        if why.errno in _ABSENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from why
        hint = "see that you may read it and that its disk is well, and try again"
        if why.errno in _TOO_MANY:
            hint = "try again with fewer files open, or with more allowed (ulimit -n)"
        place = why.filename or path
        raise HubaotiError(f"cannot read {place}: {why.strerror or why}", hint=hint) from why


@contextmanager
def open_plain(path: Path) -> Iterator[FileIO]:
    """A file to be read; a link is none, nor is a pipe, of which nothing is awaited.

    Raises:
        FileNotFoundError: there is none.
        HubaotiError: it could not be read, which says nothing of what is in it.
    """
    with explain_unread(path), open(path, "rb", buffering=0, opener=_open_no_link) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileNotFoundError(errno.ENOENT, "it is no file", str(path))
        yield file


def _open_no_link(path: str, flags: int) -> int:
    """As `_open_at_once`; a link is refused."""
    return _open_at_once(path, flags | os.O_NOFOLLOW)


def _open_at_once(path: str, flags: int) -> int:
    """As `os.open`; of a pipe that nobody writes into nothing is awaited."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_small(path: Path, most: int) -> bytes:
    """The bytes of a file that people name or write, which has at most `most` of them.

    A link is followed. Of a pipe nothing is awaited, and of a device, which may never end, nothing
    is taken.

    Raises:
        OSError: it is no such file, it is larger, or it cannot be read; its `strerror` says which.
    """
    with open_given(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        larger = f"it is larger than {most >> 20} MiB"
        raise OSError(errno.EOVERFLOW, larger, str(path))
    return content


@contextmanager
def open_given(path: Path) -> Iterator[BufferedReader]:
    """A plain file that people name, to be read.

    Raises:
        OSError: it is a pipe, a device or a folder, or cannot be read.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, and no plain file", str(path))
        yield file


def require_disk_room(folder: Path, needed: int, remedy: str = _HOME) -> None:
    """See that `needed` more bytes go below `folder`, before any is written.

    `remedy` is what else can be done than to free some space.

    Raises:
        DiskFull: they do not.
    """
    if free_bytes(folder) < needed:
        raise describe_no_room(folder, needed, remedy)


def describe_no_room(folder: Path, needed: int, remedy: str = _HOME) -> DiskFull:
    """The error that says how much is needed, and how much is free."""
    need = f"{format_mebibytes(needed)} needed, " if needed else ""
    return DiskFull(
        f"no room on the disk of {folder}: {need}{format_mebibytes(free_bytes(folder))} free",
        hint=f"free some space there, or {remedy}",
    )


def allows_code(folder: Path) -> bool:
    """Whether the disk of a folder, existing or not, allows code to be loaded from it.

    Of one that may not be looked at, too: who writes there is told what is wrong.
    """
    try:
        return not os.statvfs(_find_existing_folder(folder)).f_flag & os.ST_NOEXEC
    except OSError:
        return True


def require_code(folder: Path, remedy: str) -> None:
    """See that what is built below `folder` can be loaded; `remedy` is how to say another one.

    Raises:
        CannotOpen: it cannot.
    """
    if not allows_code(folder):
        raise CannotOpen(
            f"{folder} is on a disk that is mounted noexec, and what is built there is loaded",
            hint=f"{remedy} a folder on a disk that allows code",
        )


def find_full_disk(error: BaseException | str, *folders: Path) -> Path:
    """The folder whose disk had no room: the one that the error names, else that with the least.

    Looked at are `folders`, and where the system, and we, put temporary files.
    """
    if named := _NAMED.search(str(error)):
        place = Path(named[1] or named[2]).parent
        if place.is_dir():
            return place
    return min((*folders, Path(tempfile.gettempdir()), Path("/tmp")), key=free_bytes)


def free_bytes(folder: Path) -> int:
    """The bytes that this user may still write on the disk of a folder, existing or not."""
    return shutil.disk_usage(_find_existing_folder(folder)).free


def are_on_one_disk(one: Path, other: Path) -> bool:
    """Whether two folders, existing or not, are on one disk."""
    return _find_existing_folder(one).stat().st_dev == _find_existing_folder(other).stat().st_dev


def _find_existing_folder(folder: Path) -> Path:
    """The folder, or the first one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def format_mebibytes(size: int) -> str:
    """Bytes as MiB, with one decimal."""
    return f"{size / (1 << 20):.1f} MiB"
