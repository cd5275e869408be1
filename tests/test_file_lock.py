"""Locks on files: whoever removes one, and whatever a disk can do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hubaoti.host import file_lock
from hubaoti.host.file_lock import AT_ONCE, SHARED, hold_file_lock, take_file_lock


def test_a_lock_that_was_got_after_its_file_was_removed_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sweeps may have opened it before another holder came, which has a lock of its own."""
    flock, got = file_lock.fcntl.flock, list[int]()
    path = tmp_path / "folder.lock"

    def flock_late(handle: int, how: int) -> None:
        if not got:  # meanwhile its holder ends, and another begins
            path.unlink()
            path.touch()
        flock(handle, how)
        got.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(file_lock.fcntl, "flock", flock_late)
    with hold_file_lock(path):
        assert len(got) == 2 and got[1] == path.stat().st_ino != got[0]


def test_one_holds_a_lock_or_many_share_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    shared = [take_file_lock(path, SHARED) for _ in range(2)]
    for handle in shared:
        with pytest.raises(BlockingIOError):
            take_file_lock(path, AT_ONCE)
        os.close(handle)
    with hold_file_lock(path), pytest.raises(BlockingIOError):
        take_file_lock(path, AT_ONCE)
    os.close(take_file_lock(path, AT_ONCE))


def test_on_a_disk_without_locks_nobody_waits_and_nobody_takes_what_others_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    with hold_file_lock(tmp_path / "lock"), pytest.raises(OSError, match="No locks"):
        take_file_lock(tmp_path / "lock", AT_ONCE)


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        take_file_lock(tmp_path / "lock")
    assert not (tmp_path / "other").exists()
