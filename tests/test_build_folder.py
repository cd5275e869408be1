"""Folders in which packages are made: held while somebody builds, and swept by whoever is next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hubaoti.compiler import build_folder
from hubaoti.compiler.build_folder import hold_build_folder
from hubaoti.errors import HubaotiError, UnsafeFolder

# Holds a folder, says so, and works in it for a while: long, or again and again.
HOLDER = """
import sys, time
from hubaoti.compiler.build_folder import hold_build_folder
name, times, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for at in range(times):
    with hold_build_folder(name) as folder:
        assert list(folder.iterdir()) == []
        (folder / "made").write_text(f"{name} {at}")
        print(folder, flush=True)
        time.sleep(seconds)
        assert (folder / "made").read_text() == f"{name} {at}"
"""


def hold(name: str, times: int = 1, seconds: float = 0.0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLDER, name, str(times), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def hold_and_kill(name: str) -> Path:
    """The folder that a build leaves which was killed in the middle."""
    with hold(name, seconds=60) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
    assert (folder / "made").exists()
    return folder


def left(folder: Path) -> list[str]:
    return [each.name for each in folder.parent.iterdir() if each.stem == folder.name]


def test_any_build_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = hold_and_kill(f"killed {tmp_path}")
    with hold_build_folder(f"another {tmp_path}") as mine:
        assert left(folder) == []
    assert left(mine) == []


def test_what_has_no_lock_is_swept_too(tmp_path: Path) -> None:
    """As where it could not be removed, and its lock was."""
    folder = hold_and_kill(f"killed {tmp_path}")
    folder.with_suffix(".lock").unlink()
    with hold_build_folder(f"another {tmp_path}"):
        assert left(folder) == []


def test_what_cannot_be_removed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, hold_build_folder(f"kept {tmp_path}") as folder:
        (folder / "made").touch()
        broken.setattr(build_folder, "remove_tree", lambda *_, **__: None)
    assert sorted(left(folder)) == [folder.name, f"{folder.name}.lock"]
    with monkeypatch.context() as broken, pytest.raises(HubaotiError, match="cannot be emptied"):
        broken.setattr(build_folder, "remove_tree", lambda *_, **__: None)
        hold_build_folder(f"kept {tmp_path}").__enter__()
    with hold_build_folder(f"another {tmp_path}"):
        assert left(folder) == []


def test_builds_at_once_never_take_each_other_s_folder(tmp_path: Path) -> None:
    """Each sweeps as it begins, and so do two of one name, one of which waits."""
    names = [f"{name} {tmp_path}" for name in ("one", "one", "two", "three")]
    processes = [hold(name, times=60, seconds=0.005) for name in names]
    assert [
        (process.communicate()[0].count("\n"), process.returncode) for process in processes
    ] == [(60, 0)] * len(names)


def test_a_folder_that_others_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = 4_000_000_000 + os.getpid()  # of a folder that is nobody's
    monkeypatch.setattr(build_folder.os, "getuid", lambda: uid)
    root = Path(f"/tmp/hubaoti-build-{uid}")
    try:
        with pytest.raises(UnsafeFolder):
            hold_build_folder("name").__enter__()
    finally:
        root.rmdir()
