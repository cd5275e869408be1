"""What engines hear from their processes: answers of ours, or the process counts as gone."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubaoti.engines import wire
from hubaoti.engines.background_compile import Building, Work
from hubaoti.engines.messages import Begin, Tell
from hubaoti.engines.wire import LENGTH, Gone, receive, send
from hubaoti.engines.worker_client import Isolated
from hubaoti.errors import BadRequest, CompileFailed, WorkerEnded
from hubaoti.settings import Settings

STATE = "State('generate', None, 1, 0, 0, {}, 'host')"
WORKER = """
import socket, sys, msgspec
from hubaoti.engines.messages import *
from hubaoti.engines.wire import LENGTH, receive
engine = socket.socket(fileno=int(sys.argv[1]))
def say(content): engine.sendall(LENGTH.pack(len(content)) + content)
receive(engine)
{said}
receive(engine)
"""
GOOD = f"say(msgspec.msgpack.encode({STATE})); receive(engine)"
GARBAGE = {
    "what is no record": "engine.sendall(b'\\xff' * 4096)",
    "what is no answer": "say(b'\\xc1 garbage')",
    "a list": "say(msgspec.msgpack.encode([1, 2]))",
    "another answer": "say(msgspec.msgpack.encode(Measured([1])))",
}


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Have the children of a module be some code instead."""

    def speak(module: str, code: str) -> None:
        monkeypatch.setattr(f"{module}.build_command", lambda name: [sys.executable, "-c", code])

    return speak


@pytest.mark.parametrize("what", GARBAGE)
def test_a_worker_that_answers_nothing_of_ours_is_ended_and_started_again(
    what: str, speaking: Callable[[str, str], None], tmp_path: Path
) -> None:
    speaking("hubaoti.engines.worker_client", WORKER.format(said=f"{GOOD}; {GARBAGE[what]}"))
    worker = Isolated(Begin("model", "generate"), Settings(tmp_path))
    before = worker.pid
    with pytest.raises(WorkerEnded, match=r"has no answer: it (said|answered)"):
        worker.ask(Tell())
    assert worker.pid not in (None, before)
    worker.close()


@pytest.mark.parametrize("what", GARBAGE)
def test_a_worker_that_begins_with_nothing_of_ours_cannot_be_loaded(
    what: str, speaking: Callable[[str, str], None], tmp_path: Path
) -> None:
    speaking("hubaoti.engines.worker_client", WORKER.format(said=GARBAGE[what]))
    with pytest.raises(WorkerEnded, match=r"cannot be loaded: it (said|answered)"):
        Isolated(Begin("model", "generate"), Settings(tmp_path))


def test_what_is_said_between_processes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LARGEST_RECORD", 100)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(BadRequest, match="too much"):
            send(ours, "x" * 101)
        send(ours, "x" * 50)
        assert len(receive(theirs)) > 50
        ours.sendall(LENGTH.pack(101) + b"x" * 101)
        with pytest.raises(Gone):
            receive(theirs)


@pytest.mark.parametrize("said", ["''", "'garbage'", "'[]'", '"{}"', "'x' * (3 << 20)", "'\\xff'"])
def test_a_compile_that_says_nothing_of_ours_has_failed(
    said: str, speaking: Callable[[str, str], None]
) -> None:
    words: Any = ("model", {}, None, {})
    speaking(
        "hubaoti.engines.background_compile", f"import sys; sys.stdout.write({said}); sys.exit(3)"
    )
    with pytest.raises(CompileFailed, match="code 3"):
        Building(Work(*words)).outcome()


def test_a_compile_s_last_line_counts_whatever_was_printed_before(
    speaking: Callable[[str, str], None],
) -> None:
    words: Any = ("model", {}, None, {})
    code = "print('x' * (3 << 20)); print('{\"digest\": \"abc\"}')"
    speaking("hubaoti.engines.background_compile", code)
    assert Building(Work(*words)).outcome().digest == "abc"


@pytest.mark.parametrize("limit", ["unlimited", "64000000"])
def test_a_crash_is_held_against_a_graph_unless_memory_was_limited(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = WORKER.format(said=f"{GOOD}; import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    words = ["bash", "-c", f'ulimit -v {limit}; exec "$@"', "-", sys.executable, "-c", code]
    monkeypatch.setattr("hubaoti.engines.worker_client.build_command", lambda name: words)
    blamed: list[int] = []
    monkeypatch.setattr(Isolated, "_blamed", lambda self, number: blamed.append(number) or "")
    worker = Isolated(Begin("model", "generate"), Settings(tmp_path))
    with pytest.raises(WorkerEnded, match="SIGSEGV"):
        worker.ask(Tell())
    worker.close()
    assert len(blamed) == (limit == "unlimited")
