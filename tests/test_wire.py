"""What engines hear from their processes: answers of ours, or the process counts as gone."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hubaoti.engines.background_compile import Building, Work
from hubaoti.engines.messages import Begin, Tell
from hubaoti.engines.worker_client import Isolated
from hubaoti.errors import BadDim, BadRequest, CompileFailed, HubaotiError, WorkerEnded
from hubaoti.host.wire import LENGTH, Channel, ErrorRecord, Garbled, Gone
from hubaoti.settings import Settings

STATE = "State('generate', None, 1, 0, 0, {}, 'host')"
CHILD = """
import socket, sys, msgspec
from hubaoti.engines.background_compile import *
from hubaoti.engines.messages import *
from hubaoti.host.wire import LENGTH, Channel
end = socket.socket(fileno=int(sys.argv[2]))
channel = Channel(end)
def say(content): end.sendall(LENGTH.pack(len(content)) + content)
def receive(): channel.receive(object)
receive()
"""
WORKER = (
    CHILD
    + """
{said}
receive()
"""
)
GOOD = f"channel.send({STATE}); receive()"
GARBAGE = {
    "what is no record": "end.sendall(b'\\xff' * 4096)",
    "what is no answer": "say(b'\\xc1 garbage')",
    "a list": "channel.send([1, 2])",
    "another answer": "channel.send(Measured([1]))",
}


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have our children be some code instead."""

    def speak(code: str) -> None:
        words = [sys.executable, "-c", code]
        monkeypatch.setattr("hubaoti.host.processes.build_command", lambda name: words)

    return speak


@pytest.mark.parametrize("what", GARBAGE)
def test_a_worker_that_answers_nothing_of_ours_is_ended_and_started_again(
    what: str, speaking: Callable[[str], None], tmp_path: Path
) -> None:
    speaking(WORKER.format(said=f"{GOOD}; {GARBAGE[what]}"))
    worker = Isolated(Begin("model", "generate"), Settings(tmp_path))
    before = worker.pid
    with pytest.raises(WorkerEnded, match=r"has no answer: it (said|answered)"):
        worker.ask(Tell())
    assert worker.pid not in (None, before)
    worker.close()


@pytest.mark.parametrize("what", GARBAGE)
def test_a_worker_that_begins_with_nothing_of_ours_cannot_be_loaded(
    what: str, speaking: Callable[[str], None], tmp_path: Path
) -> None:
    speaking(WORKER.format(said=GARBAGE[what]))
    with pytest.raises(WorkerEnded, match=r"cannot be loaded: it (said|answered)"):
        Isolated(Begin("model", "generate"), Settings(tmp_path))


def test_what_is_said_between_processes_is_bounded() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        near, far = Channel(ours, most=100), Channel(theirs, most=100)
        with pytest.raises(BadRequest, match="too much"):
            near.send("x" * 101)
        near.send("x" * 50)
        assert far.receive(str) == "x" * 50
        assert far.received > 50
        ours.sendall(LENGTH.pack(101) + b"x" * 101)
        with pytest.raises(Garbled):
            far.receive(str)


def test_one_that_ends_amid_a_record_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(LENGTH.pack(100) + b"x")
        with pytest.raises(Gone, match="half"):
            Channel(theirs).receive(str)
        with pytest.raises(Gone):
            Channel(theirs).send("x")


def test_one_that_drips_is_not_waited_for_longer_than_one_that_is_silent() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(LENGTH.pack(600))

    def drip() -> None:
        with suppress(OSError):  # until it is closed
            for _ in range(600):
                theirs.sendall(b"x")
                time.sleep(0.005)

    dripping = threading.Thread(target=drip)
    dripping.start()
    began = time.monotonic()
    with ours, pytest.raises(Gone):
        Channel(ours).receive(int, began + 0.3)
    assert time.monotonic() - began < 1
    dripping.join()
    theirs.close()


def test_one_that_was_closed_is_gone_for_whoever_waits() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    channel.close()
    theirs.close()
    assert channel.is_readable()
    with pytest.raises(Gone):
        channel.receive(int)


def test_an_error_is_raised_as_what_it_was() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = BadDim("seq is malformed", hint="write it as batch=1:32")
        Channel(ours).send(ErrorRecord.of(sent, "a note"))
        with pytest.raises(HubaotiError) as caught:
            Channel(theirs).receive(int | ErrorRecord)
    assert (type(caught.value), str(caught.value)) == (BadDim, str(sent))
    assert (caught.value.hint, caught.value.notes) == (sent.hint, ["a note"])


@pytest.mark.parametrize(
    "said",
    [
        "",
        "end.sendall(b'garbage')",
        "channel.send([])",
        "channel.send({})",
        "end.sendall(b'x' * (3 << 20))",
        "say(b'\\xff')",
        "print('garbage')",
    ],
)
def test_a_compile_that_says_nothing_of_ours_has_failed(
    said: str, speaking: Callable[[str], None]
) -> None:
    words: Any = ("model", {}, None, {})
    speaking(f"{CHILD}\ntry: {said or 'pass'}\nfinally: sys.exit(3)")
    with pytest.raises(CompileFailed, match="code 3"):
        Building(Work(*words)).wait()


def test_what_a_compile_prints_is_no_answer(speaking: Callable[[str], None]) -> None:
    words: Any = ("model", {}, None, {})
    speaking(f"{CHILD}\nprint('x' * (3 << 20), flush=True); channel.send(Outcome('abc'))")
    assert Building(Work(*words)).wait().digest == "abc"


LONG = """
import os, sys, tempfile, time
from pathlib import Path
from hubaoti.engines import background_compile
def work(asked):
    with tempfile.TemporaryDirectory() as folder:
        Path(asked.model).with_suffix(".new").write_text(f"{os.getpid()} {folder}")
        Path(asked.model).with_suffix(".new").rename(asked.model)
        time.sleep(120)
background_compile._run_work = work
background_compile.main()
"""
ENGINE = """
import sys, time
from hubaoti.engines.background_compile import Building, Work
from hubaoti.host import processes
processes.build_command = lambda name: [sys.executable, "-c", sys.argv[1]]
building = Building(Work(sys.argv[2], {}, None, {}))
sys.stdin.read()
building.stop()
"""


@pytest.mark.parametrize("ends", ["it stops the compile", "it is killed"])
def test_a_compile_ends_with_its_engine_and_takes_its_files_along(
    ends: str, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    command = [sys.executable, "-c", ENGINE, LONG, str(note)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as engine:
        wait_until(note.exists)
        process, folder = note.read_text().split()
        assert Path(folder).is_dir()
        if ends == "it is killed":
            engine.kill()
    wait_until(lambda: not is_alive(process))
    assert not Path(folder).exists()


def is_alive(process: str) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that comes by itself."""
    end = time.monotonic() + 60.0
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("limit", ["unlimited", "64000000"])
def test_a_crash_is_held_against_a_graph_unless_memory_was_limited(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = WORKER.format(said=f"{GOOD}; import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    words = ["bash", "-c", f'ulimit -v {limit}; exec "$@"', "-", sys.executable, "-c", code]
    monkeypatch.setattr("hubaoti.host.processes.build_command", lambda name: words)
    blamed: list[int] = []
    monkeypatch.setattr(Isolated, "_blame", lambda self, number: blamed.append(number) or "")
    worker = Isolated(Begin("model", "generate"), Settings(tmp_path))
    with pytest.raises(WorkerEnded, match="SIGSEGV"):
        worker.ask(Tell())
    worker.close()
    assert len(blamed) == (limit == "unlimited")
