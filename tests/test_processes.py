"""Processes of our own: what they say is bounded, and ends with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hubaoti.host.processes import (
    PRINTED,
    Child,
    ChildOutput,
    build_command,
    collect_records,
    list_search_path,
)

TALKERS = """
import os, resource, subprocess, sys, time
from hubaoti.host.processes import join_parent
channel = join_parent(is_awaited=True)
def say(record): channel.send(record)
def echo(): say(str(len(channel.receive(str))))
def deaf(): say("done")
def deaf_on(): time.sleep(120)
def floods():
    while True: say("x" * 65536)
def leaves():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    say(str(child.pid))
def floods_on():
    if os.fork(): time.sleep(0.5)
    else: floods()
def holds_on():
    if process := os.fork(): say(str(process))
    else: time.sleep(120)
def waits(): time.sleep(120)
def prints():
    print("x" * 100_000)
    os.write(1, b"y" * 100_000)
    say("done")
def garbles():
    say("good")
    say(12)
    time.sleep(120)
def writes():
    os.write(int(sys.argv[2]), b"\\xff" * 4096)
    time.sleep(120)
def halves():
    os.write(int(sys.argv[2]), b"\\x64\\0\\0")
def too_long():
    say("x" * 2_000_000)
    time.sleep(120)
def fails():
    print("x" * 100_000, file=sys.stderr)
    print("why \\x1b[31m\\n", file=sys.stderr)
    sys.exit(3)
def crashes():
    say(str(resource.getrlimit(resource.RLIMIT_CORE)))
    os.abort()
"""
NAMES = re.findall(r"^def (\w+)", TALKERS, re.MULTILINE)


@pytest.fixture(autouse=True)
def talkers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module for each of the talkers, as children find it."""
    (tmp_path / "talkers.py").write_text(TALKERS)
    for name in NAMES:
        (tmp_path / f"talk_{name}.py").write_text(f"from talkers import {name} as main\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def ask(name: str, request: object = None, patience: float = 60.0) -> ChildOutput:
    """What a talker says, each record a text."""
    return collect_records(f"talk_{name}", request, str, patience)


def test_a_child_is_told_all_and_says_what_it_says() -> None:
    assert ask("echo", "x" * 1_000_000) == ChildOutput(["1000000"], 0)


@pytest.mark.parametrize(("name", "said"), [("deaf", ["done"]), ("deaf_on", [])])
def test_one_that_does_not_listen_holds_nobody_up(name: str, said: list[str]) -> None:
    before = time.monotonic()
    assert ask(name, "x" * 1_000_000, 10.0).records in (said, [])
    assert time.monotonic() - before < 20.0


@pytest.mark.parametrize("name", ["floods", "floods_on"])
def test_what_is_said_is_bounded(name: str) -> None:
    output = collect_records(f"talk_{name}", None, str, 60.0, most=100_000)
    assert 100_000 < sum(map(len, output.records)) < 300_000


def test_what_is_printed_is_no_answer() -> None:
    output = ask("prints")
    assert (output.records, output.is_garbled, output.code) == (["done"], False, 0)


@pytest.mark.parametrize(
    ("name", "said"), [("garbles", ["good"]), ("writes", []), ("halves", []), ("too_long", [])]
)
def test_one_that_says_what_is_no_record_is_ended(name: str, said: list[str]) -> None:
    before = time.monotonic()
    output = ask(name)
    assert time.monotonic() - before < 50.0
    assert (output.records, output.is_garbled) == (said, True)


@pytest.mark.parametrize("name", ["leaves", "holds_on"])
def test_it_ends_with_the_child_and_so_does_what_that_started(name: str) -> None:
    before = time.monotonic()
    output = ask(name)
    assert time.monotonic() - before < 50.0
    assert output.code == 0
    wait_for_end(int(output.records[0]))


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


FORKS = """
import os, signal, sys, time
from pathlib import Path
from hubaoti.host.processes import exit_on_terminate, fork_child
exit_on_terminate()
os.register_at_fork(before=lambda: os.kill(os.getpid(), int(sys.argv[2])))
fork_child(lambda: time.sleep(60), Path(sys.argv[1]))
sys.exit(7)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_an_interrupt_amid_a_fork_is_not_lost(number: int, code: int, tmp_path: Path) -> None:
    words = [sys.executable, "-c", FORKS, str(tmp_path / "log"), str(int(number))]
    begun = time.monotonic()
    done = subprocess.run(words, timeout=50, stderr=subprocess.DEVNULL)
    assert done.returncode == code
    assert time.monotonic() - begun < 12.0


def test_one_that_takes_too_long_is_ended() -> None:
    assert ask("waits", patience=2.0).code == -signal.SIGKILL


def test_one_that_crashes_leaves_no_core_dump() -> None:
    assert ask("crashes") == ChildOutput(["(0, 0)"], -signal.SIGABRT)


def test_one_that_is_hung_up_on_ends_by_itself() -> None:
    before = time.monotonic()
    assert Child("talk_waits").end(60.0) == 0
    assert time.monotonic() - before < 50.0


def test_its_last_words_are_one_plain_line() -> None:
    output = ask("fails")
    assert (output.code, output.last) == (3, "why [31m")
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
    assert "stolen" not in collect_records("hubaoti.cli", None, str, 60.0).last
