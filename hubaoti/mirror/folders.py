"""Folders that nobody else may write, and temporary ones that never outlive their work."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubaoti.errors import HubaotiError, UnsafeFolder
from hubaoti.folder_trees import list_files, remove_tree
from hubaoti.host.file_lock import AT_ONCE, hold_file_lock

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_LOCK = ".lock"
_DIGITS = 16
_WORKSPACE = re.compile(rf"[0-9a-f]{{{_DIGITS}}}")
_LONGEST_WORK = 24 * 3600  # seconds, of an older hubaoti, which held no lock


def make_private(folder: Path) -> None:
    """Make the folder, and the missing ones above it, for this user only.

    Raises:
        UnsafeFolder: it is there, and another user owns it or may write it.
        HubaotiError: nothing can be made there.
    """
    if not folder.is_dir():
        if not folder.parent.is_dir():
            make_private(folder.parent)
        # mkdir's mode is cut by the umask, which can only take rights away.
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError as error:  # in /proc and its like
            hint = "set HUBAOTI_HOME to a folder that you may write"
            raise HubaotiError(f"cannot make {folder}", hint=hint) from error
    refuse_shared(folder)


def refuse_shared(path: Path) -> None:
    """Refuse a file or folder that is not ours alone to write; a missing one is safe.

    Raises:
        UnsafeFolder: another user owns it, or may write it.
    """
    with suppress(FileNotFoundError):
        for status in (path.lstat(), path.stat()):
            if status.st_uid != os.geteuid():
                problem = f"belongs to user {status.st_uid}"
                raise _describe_unsafe(path, problem, f"chown {os.geteuid()}")
            # A link's own mode says nothing.
            if status.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(status.st_mode):
                raise _describe_unsafe(path, "may be written by other users", "chmod go-w")


def may_write(path: Path) -> bool:
    """Whether the disk and its permissions let this user write a file or folder that is there."""
    return os.access(path, os.W_OK)


def _describe_unsafe(path: Path, problem: str, remedy: str) -> UnsafeFolder:
    return UnsafeFolder(
        f"{path} {problem}, who could plant code there",
        hint=f"make it yours alone ({remedy} {path}), or set HUBAOTI_HOME to a folder that is",
    )


@contextmanager
def make_workspace(tmp: Path) -> Iterator[Path]:
    """A folder of our own below `tmp`, gone at the block's end, whatever ends it.

    Its lock is held meanwhile, by which every process of every container sees that it is in use.
    """
    folder = tmp / secrets.token_hex(_DIGITS // 2)
    lock = folder.with_suffix(_LOCK)
    with hold_file_lock(lock):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            remove_tree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def sweep_folder(tmp: Path) -> None:
    """Remove what killed processes left below `tmp`; what a living one writes stays.

    So does what cannot be removed: it is in nobody's way.
    """
    names = set[str]()
    with suppress(OSError):
        names = {entry.name.removesuffix(_LOCK) for entry in tmp.iterdir()}
    for name in names:
        folder, lock = tmp / name, tmp / f"{name}{_LOCK}"
        with suppress(OSError):
            if _WORKSPACE.fullmatch(name):
                with hold_file_lock(lock, AT_ONCE):
                    remove_tree(folder, ignore_errors=True)
                    lock.unlink()
            elif time.time() - folder.stat().st_mtime > _LONGEST_WORK:
                remove_tree(folder)


def keep_newest(folder: Path, most: int, size: int) -> None:
    """Remove what is oldest below `folder`: `most` entries stay, of at most `size` bytes together.

    The newest stays, whatever its size.
    """
    for index, entry in enumerate(sorted(folder.iterdir(), key=_read_change_time, reverse=True)):
        size -= _count_bytes(entry)
        if index and (index >= most or size < 0):
            remove_tree(entry, ignore_errors=True)


def _read_change_time(path: Path) -> float:
    """When it was changed; long ago, if another process removed it."""
    with suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


def _count_bytes(folder: Path) -> int:
    """The bytes of all files below a folder that can be seen."""
    total = 0
    with suppress(OSError):
        for path in list_files(folder):
            with suppress(OSError):
                total += path.lstat().st_size
    return total


def is_process_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
