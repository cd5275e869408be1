"""Locks that are free in a child that was forked: the thread that had one is not there."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Renewable(Protocol):
    """What has a lock that it can make anew."""

    def renew_lock(self) -> None: ...


_ALL: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renew_in_children(thing: Renewable) -> None:
    """Have a thing make its lock anew in every child that is forked, as long as it is there."""
    _ALL.add(thing)


def _renew_locks() -> None:
    for thing in [*_ALL]:
        thing.renew_lock()


os.register_at_fork(after_in_child=_renew_locks)


class ForkSafeLock:
    """A lock for a `with` block; free in a forked child, whoever had it when it was forked."""

    __slots__ = ("_lock", "__weakref__")

    def __init__(self) -> None:
        self.renew_lock()
        renew_in_children(self)

    def renew_lock(self) -> None:
        """Nobody has it."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._lock.locked():  # it is not, in a child that was forked within the block
            self._lock.release()
