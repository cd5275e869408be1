"""The mirror after a kill, or an error, at any call of the file system or of SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import make_bundle
from disks import small
from kills import OPERATIONS
from test_gc import make
from test_mirror_store import put

from hubaoti.errors import DiskFull
from hubaoti.mirror import Mirror
from hubaoti.mirror.gc import collect
from hubaoti.mirror.removal import remove

DRIVER = Path(__file__).with_name("kills.py")
MEMORY = Path("/dev/shm")  # whose disk is no wait: a kill loses nothing that was written


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on the quickest disk."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="hubaoti-kills-", dir=parent) as found:
        yield Path(found)


def suffer(fault: str, operation: str, scratch: Path, bundles: Path) -> int:
    """How many calls of an operation a fault was tried at, one by one; nothing came of any."""
    paths = [make_bundle(bundles / name, mode=name).path for name in ("one", "two")]
    command = [sys.executable, str(DRIVER), fault, operation, str(scratch), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    *problems, last = done.stdout.splitlines()
    assert not problems, done.stdout
    return int(last.removeprefix("faults: "))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_any_call_leaves_a_mirror_that_is_whole_and_goes_on(
    operation: str, scratch: Path, tmp_path: Path
) -> None:
    assert suffer("SIGKILL", operation, scratch, tmp_path) >= 20


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "EROFS"])
def test_an_error_of_the_disk_at_any_call_is_said_in_words_and_nothing_is_lost(
    fault: str, operation: str, scratch: Path, tmp_path: Path
) -> None:
    assert suffer(fault, operation, scratch, tmp_path) >= 2


def test_a_full_disk_keeps_what_is_whole_and_takes_more_once_there_is_room(tmp_path: Path) -> None:
    with small(tmp_path / "home", "2m") as disk, Mirror.open(disk / "mirror") as mirror:
        stored = []
        with pytest.raises(DiskFull) as caught:
            for at in range(40):
                stored.append(put(mirror, make(tmp_path, f"{at}")))
        assert len(stored) > 5 and "free" in caught.value.hint
        for row in mirror.ls():
            artifact = mirror.artifact(row.digest)
            assert artifact is not None
            mirror.verify(artifact)
        assert len(mirror.ls()) == len(stored)
        for artifact in stored[:3]:
            remove(mirror, artifact.digest)
        mirror.verify(put(mirror, make(tmp_path, "more")))
        assert collect(mirror).orphans == ()
