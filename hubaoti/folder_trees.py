"""Folders within folders, however deep somebody else made them: listed, and removed.

What Python 3.11 has for both (`rglob`, `os.walk`, `shutil.rmtree`) calls itself for each folder: a
thousand within each other, which an archive can hold, end it. No link to a folder is followed here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
_OURS = 0o700


def list_files(folder: Path) -> Iterator[Path]:
    """All that is no folder below a folder, links to files and to folders among it.

    Raises:
        OSError: a folder cannot be listed, or lies deeper than a path may be long.
    """
    folders = [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield Path(entry.path)


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder with all that is in it; a link in its place is none, and none is followed.

    What cannot be removed stays, and everything else goes. One folder is open at a time, and the
    next is reached from it, so that no path is too long.

    Raises:
        OSError: the first of what could not be removed; none with `ignore_errors`.
    """
    try:
        walk = _Walk(path)
        try:
            walk.remove_all()
        finally:
            walk.close()
        if walk.failed is not None:
            raise walk.failed
        path.rmdir()
    except OSError:
        if not ignore_errors:
            raise


@dataclass(frozen=True, slots=True)
class _Level:
    """A folder on the way down: its name, which one it is, and the folders that are left in it."""

    name: str
    identity: tuple[int, int]
    folders: list[str]


class _Walk:
    """A way through all folders below one; the one where it is stands open."""

    def __init__(self, path: Path) -> None:
        self.failed: OSError | None = None
        self._handle = os.open(path, _FOLDER)
        self._levels = [self._clear(str(path))]

    def close(self) -> None:
        os.close(self._handle)

    def remove_all(self) -> None:
        """Remove all that is below the first folder, of each folder its files first."""
        while True:
            if self._levels[-1].folders:
                self._go_down(self._levels[-1].folders.pop())
            elif len(self._levels) > 1:
                self._go_up()
            else:
                return

    def _clear(self, name: str) -> _Level:
        """Remove the files of the folder where it is."""
        status, folders = os.fstat(self._handle), list[str]()
        if status.st_mode & _OURS != _OURS:
            with suppress(OSError):
                os.fchmod(self._handle, _OURS)
        for entry in self._list():
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                else:
                    os.unlink(entry.name, dir_fd=self._handle)
            except OSError as error:
                self._note(error)
        return _Level(name, (status.st_dev, status.st_ino), folders)

    def _list(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._handle) as entries:
                return [*entries]
        except OSError as error:
            self._note(error)
            return []

    def _go_down(self, name: str) -> None:
        try:
            handle = os.open(name, _FOLDER, dir_fd=self._handle)
        except OSError as error:
            self._note(error)
            return
        self._move(handle)
        self._levels.append(self._clear(name))

    def _go_up(self) -> None:
        """Go to the folder above, and remove the one that it came from."""
        left, above = self._levels.pop(), self._levels[-1]
        self._move(os.open("..", _FOLDER, dir_fd=self._handle))
        status = os.fstat(self._handle)
        if (status.st_dev, status.st_ino) != above.identity:
            raise OSError(errno.ESTALE, "somebody moved a folder while it was removed", left.name)
        try:
            os.rmdir(left.name, dir_fd=self._handle)
        except OSError as error:
            self._note(error)

    def _move(self, handle: int) -> None:
        os.close(self._handle)
        self._handle = handle

    def _note(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # somebody else removed it
            self.failed = self.failed or error
