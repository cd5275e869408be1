"""Who holds what in a mirror: artifacts that are open somewhere, and work that one process does.

Each is the lock of a file below `locks/`, so it ends with its holder, and counts in every container
that sees the folder. A mirror that may not be written has no locks of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubaoti.disk import explain_disk_errors
from hubaoti.errors import ArtifactHeld
from hubaoti.host.file_lock import AT_ONCE, SHARED, release_file_lock, take_file_lock
from hubaoti.progress import Progress, report_nothing

_WORK, _LEASE = ".work", ".lease"
_STORE = "store"
# The leases of this process, by their files. A library that was opened stays mapped until it ends.
_HELD: dict[Path, int] = {}


class Leases:
    """The locks of a mirror, below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hold(self, digest: str) -> bool:
        """Have an artifact stay as long as this process lives, and those that it forks.

        Whether it was not held before.
        """
        path = self._folder / f"{digest}{_LEASE}"
        if path not in _HELD:
            with suppress(OSError):  # a mirror that may not be written
                handle = take_file_lock(path, SHARED)
                if _HELD.setdefault(path, handle) == handle:
                    return True
                os.close(handle)  # another thread was faster
        return False

    @contextmanager
    def holding(self, digest: str) -> Iterator[None]:
        """Around what brings an artifact: held from before it is there, unless it does not come."""
        is_new = self.hold(digest)
        try:
            yield
        except BaseException:
            if is_new:
                os.close(_HELD.pop(self._folder / f"{digest}{_LEASE}"))
            raise

    def forget_unheld(self) -> None:
        """Remove the files of leases that nobody has any more."""
        for path in self._folder.glob(f"*{_LEASE}"):
            self.is_held(path.stem)

    def is_held(self, digest: str) -> bool:
        """Whether a living process has an artifact open."""
        try:
            with self.removing(digest):
                return False
        except ArtifactHeld:
            return True

    @contextmanager
    def removing(self, digest: str) -> Iterator[None]:
        """Around the removal of an artifact, which nobody opens meanwhile.

        Raises:
            ArtifactHeld: a living process has it open, or its disk cannot say so.
        """
        path = self._folder / f"{digest}{_LEASE}"
        try:
            handle = take_file_lock(path, AT_ONCE)
        except OSError as error:
            raise ArtifactHeld(
                f"artifact {digest[:12]} is open in a process that lives",
                hint="end that process first, or leave the artifact where it is",
            ) from error
        try:
            yield
        finally:
            _let_go(path, handle)

    @contextmanager
    def alone(self, work: str, progress: Progress = report_nothing) -> Iterator[None]:
        """Around work, by its name, that one process at a time does; the others wait for it."""
        path = self._folder / f"{work}{_WORK}"
        try:
            handle = take_file_lock(path, AT_ONCE)
        except OSError:
            progress(f"waiting for another process, which is at {work[:20]}")
            with explain_disk_errors(self._folder):
                handle = take_file_lock(path)
        try:
            yield
        finally:
            _let_go(path, handle)

    @contextmanager
    def changing_files(self) -> Iterator[None]:
        """Around what makes files and promises them, or takes both away: one process at a time."""
        with self.alone(_STORE):
            yield


def _let_go(path: Path, handle: int) -> None:
    """Remove a lock's file and let go of it; one that a broken disk keeps is taken again."""
    with suppress(OSError):
        path.unlink()  # before it is let go: who waits for it makes a new one
    release_file_lock(handle)
