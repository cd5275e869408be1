"""The mirror after a kill at any call of the file system or of SQLite, of whatever it does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import make_bundle
from kills import OPERATIONS

DRIVER = Path(__file__).with_name("kills.py")
MEMORY = Path("/dev/shm")  # whose disk is no wait: a kill loses nothing that was written
LEAST = 20  # calls of the least of them


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on the quickest disk."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="hubaoti-kills-", dir=parent) as found:
        yield Path(found)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_any_call_leaves_a_mirror_that_is_whole_and_goes_on(
    operation: str, scratch: Path, tmp_path: Path
) -> None:
    bundles = [make_bundle(tmp_path / name, mode=name).path for name in ("one", "two")]
    command = [sys.executable, str(DRIVER), operation, str(scratch), *map(str, bundles)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    *problems, last = done.stdout.splitlines()
    assert not problems, done.stdout
    assert int(last.removeprefix("kills: ")) >= LEAST
