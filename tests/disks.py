"""Disks as some machines have them, mounted for a while."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder as in a baked image: on a disk that may not be written."""
    steps = [["--bind", str(folder)], ["-o", "remount,ro,bind"]]
    for at, step in enumerate(steps):
        command = ["mount", *step, str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            if at:
                subprocess.run(["umount", str(folder)], check=True)
            pytest.skip("a folder cannot be mounted read-only here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small(folder: Path, size: str = "1m") -> Iterator[Path]:
    """A folder on a disk of its own, which is soon full."""
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def immovable(path: Path) -> Iterator[None]:
    """A file or folder that nobody can rename or remove, as one that a busy disk keeps."""
    command = ["chattr", "+i", str(path)]
    if shutil.which("chattr") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)
