"""The folder in which a package is made: ours alone, and empty at each start.

Whoever builds in one holds its lock; the system lets go of that when they are killed. Who builds
next, whatever it is, removes what nobody holds.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubaoti.disk import allows_code
from hubaoti.errors import HubaotiError, UnsafeFolder
from hubaoti.folder_trees import remove_tree
from hubaoti.host.file_lock import AT_ONCE, hold_file_lock

_OURS = re.compile(r"[0-9a-f]{16}(\.lock)?\Z")


@contextmanager
def hold_build_folder(name: str) -> Iterator[Path]:
    """A folder of ours, empty, for one build of this name at a time.

    A folder that others could write to would let them plant code in what is built.

    Raises:
        UnsafeFolder: somebody else made a folder of that name.
        HubaotiError: what lies in it cannot be removed.
    """
    root = find_build_disk() / f"hubaoti-build-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if root.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UnsafeFolder(
            f"{root} belongs to somebody else, or others may write it",
            hint=f"remove it, or: chmod 700 {root}",
        )
    _sweep(root)
    folder = root / hashlib.sha256(name.encode()).hexdigest()[:16]
    with hold_file_lock(folder.with_suffix(".lock")):
        if not _is_removed(folder):
            raise HubaotiError(f"{folder} cannot be emptied", hint=f"remove it: rm -r {folder}")
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            _release(folder)


def find_build_disk() -> Path:
    """The folder that has those of builds: /tmp, unless only that of temporary files allows code.

    For a GPU triton loads what it builds there.
    """
    places = (Path("/tmp"), Path(tempfile.gettempdir()))
    return next(filter(allows_code, places), places[0])


def _release(folder: Path) -> None:
    """Remove a folder whose lock is held; while something of it stays, so does the lock's file."""
    if _is_removed(folder):
        folder.with_suffix(".lock").unlink(missing_ok=True)


def _is_removed(folder: Path) -> bool:
    """Remove a folder with all that is in it, and see whether it is gone."""
    remove_tree(folder, ignore_errors=True)
    return not folder.exists()


def _sweep(root: Path) -> None:
    """Remove what builds left that were killed: folders whose lock nobody holds."""
    names = {each.stem for each in root.iterdir() if _OURS.match(each.name)}
    for folder in (root / name for name in names):
        with suppress(OSError), hold_file_lock(folder.with_suffix(".lock"), AT_ONCE):
            _release(folder)
