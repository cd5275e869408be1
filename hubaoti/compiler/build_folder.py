"""The folder in which a package is made: ours alone, and empty at each start."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubaoti.disk import allows_code
from hubaoti.errors import UnsafeFolder


@contextmanager
def hold_build_folder(name: str) -> Iterator[Path]:
    """A folder of ours, empty, for one build of this name at a time.

    A folder that others could write to would let them plant code in what is built.

    Raises:
        UnsafeFolder: somebody else made a folder of that name.
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
    with _hold_lock(folder.with_suffix(".lock")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def find_build_disk() -> Path:
    """The folder that has those of builds: /tmp, unless only that of temporary files allows code.

    For a GPU triton loads what it builds there.
    """
    places = (Path("/tmp"), Path(tempfile.gettempdir()))
    return next(filter(allows_code, places), places[0])


@contextmanager
def _hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock of this name; who held it before may have removed its file."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                yield
                return


def _sweep(root: Path) -> None:
    """Remove what builds left that were killed: folders whose lock nobody holds."""
    for path in root.glob("*.lock"):
        with suppress(OSError), path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()
