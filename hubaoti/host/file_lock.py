"""Locks on files: the system lets go of one when its holder ends, however, and wherever it runs.

A process id says nothing in another container, after a reboot, or once it was given anew; a lock
does. On a disk without locks nobody is waited for, and nothing that others may hold is removed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB
SHARED = fcntl.LOCK_SH


def take_file_lock(path: Path, how: int = fcntl.LOCK_EX) -> int:
    """A handle that holds the lock of a file, which is made where it is not there.

    Closing it lets go, once each child that was forked meanwhile has closed it or ended, too.

    Raises:
        BlockingIOError: somebody holds it, and `how` is `AT_ONCE`.
        OSError: it cannot be made; or the disk has no locks, where `how` is `AT_ONCE`.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, how)
        except OSError:
            if not how & fcntl.LOCK_NB:
                return handle  # a disk without locks: then nobody takes it from us, either
            os.close(handle)
            raise
        except BaseException:
            os.close(handle)
            raise
        if _is_file_of(path, handle):
            return handle
        os.close(handle)  # who held it has removed the file


@contextmanager
def hold_file_lock(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock of a file for a while, as `take_file_lock` takes it."""
    handle = take_file_lock(path, how)
    try:
        yield
    finally:
        release_file_lock(handle)


def release_file_lock(handle: int) -> None:
    """Let go of a lock at once, for a child that was forked meanwhile, too."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _is_file_of(path: Path, handle: int) -> bool:
    """Whether a lock that was got is still the one that others find."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(handle))
    return False
