"""Locks that are free in a child that was forked: the thread that had one is not there."""

from __future__ import annotations

import os
import threading
import weakref


class ForkSafeLock:
    """A lock for a `with` block; free in a forked child, whoever had it when it was forked."""

    __slots__ = ("_lock", "__weakref__")

    def __init__(self) -> None:
        self.renew()
        _ALL.add(self)

    def renew(self) -> None:
        """Nobody has it."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._lock.locked():  # it is not, in a child that was forked within the block
            self._lock.release()


_ALL: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_locks() -> None:
    for lock in [*_ALL]:
        lock.renew()


os.register_at_fork(after_in_child=_renew_locks)
