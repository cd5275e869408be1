"""Processes of our own: what they say is bounded, and ends with them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hubaoti.host.processes import (
    PRINTED,
    ChildOutput,
    build_command,
    collect_output,
    list_search_path,
)

TALKERS = """
import subprocess, sys, time
def echo(): sys.stdout.write(str(len(sys.stdin.buffer.read())))
def deaf(): print("done")
def floods():
    while True: sys.stdout.write("x" * 65536)
def leaves():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    print(child.pid, flush=True)
def floods_on():
    code = "while True: print('x' * 65536, flush=True)"
    subprocess.Popen([sys.executable, "-c", code])
    time.sleep(0.5)
def waits(): time.sleep(120)
def fails():
    print("x" * 100_000, file=sys.stderr)
    print("why \\x1b[31m\\n", file=sys.stderr)
    sys.exit(3)
"""


@pytest.fixture(autouse=True)
def talkers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module for each of the talkers, as children find it."""
    (tmp_path / "talkers.py").write_text(TALKERS)
    for name in ("echo", "deaf", "floods", "leaves", "floods_on", "waits", "fails"):
        (tmp_path / f"talk_{name}.py").write_text(f"from talkers import {name} as main\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_child_is_told_all_and_says_what_it_says() -> None:
    assert collect_output("talk_echo", b"x" * 1_000_000, 60.0) == ChildOutput(b"1000000", 0)


def test_one_that_does_not_listen_holds_nobody_up() -> None:
    assert collect_output("talk_deaf", b"x" * 1_000_000, 60.0).out == b"done\n"


@pytest.mark.parametrize("name", ["floods", "floods_on"])
def test_what_is_said_is_bounded(name: str) -> None:
    told = collect_output(f"talk_{name}", b"", 60.0, most=100_000)
    assert 100_000 < len(told.out) < 300_000


def test_it_ends_with_the_child_and_so_does_what_that_started() -> None:
    before = time.monotonic()
    told = collect_output("talk_leaves", b"", 60.0)
    assert time.monotonic() - before < 50.0
    assert told.code == 0
    wait_for_end(int(told.out))


def wait_for_end(process: int) -> None:
    """Wait until there is no such process, or only what is left of one."""
    end = time.monotonic() + 20.0
    while Path(f"/proc/{process}").exists() and "\nState:\tZ" not in status(process):
        assert time.monotonic() < end
        time.sleep(0.02)


def status(process: int) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except OSError:
        return "\nState:\tZ"


def test_one_that_takes_too_long_is_ended() -> None:
    assert collect_output("talk_waits", b"", 1.0).code == -signal.SIGKILL


def test_its_last_words_are_one_plain_line() -> None:
    told = collect_output("talk_fails", b"", 60.0)
    assert (told.code, told.last) == (3, "why [31m")
    assert PRINTED < 100_000


def test_the_folders_of_modules_are_told_by_their_whole_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "lib", "/usr/\udcff"])
    found = [*map(os.fsdecode, list_search_path())]
    assert found == [str(tmp_path), str(tmp_path / "lib"), "/usr/\udcff"]


def test_a_child_does_not_find_modules_where_somebody_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "signal.py").write_text("raise SystemExit('stolen')")
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    assert "-P" in build_command("talk_echo")
    assert "stolen" not in collect_output("hubaoti.cli", b"", 60.0).last
