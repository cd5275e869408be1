"""The process of one model: it loads it, answers one request after the other, and ends with its
engine. What crashes here, or takes too much memory, ends nobody else.
"""

from __future__ import annotations

import mmap
import os
import resource
import select
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hubaoti.engines.local import Resident
from hubaoti.engines.messages import EngineRequest, EngineResponse, Failed, Hello
from hubaoti.engines.wire import Gone, decode_record, receive, send
from hubaoti.errors import HubaotiError, first_line
from hubaoti.runtime.custom_ops import register_ops
from hubaoti.settings import Settings

# The system ends this process for memory before it ends the engine (proc(5)).
_FIRST_TO_GO = "500"


def main() -> None:
    """The worker: its socket and its note of running graphs on the command line, by number."""
    engine = socket.socket(fileno=int(sys.argv[1]))
    running = memoryview(mmap.mmap(int(sys.argv[2]), mmap.PAGESIZE)).cast("I")
    os.dup2(2, 1)  # what is printed here is nobody's answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    threading.Thread(target=_end_with, args=(engine,), daemon=True).start()
    with suppress(Gone):
        _serve(engine, running)
    os._exit(0)  # without waiting for what libraries do at their end


def _end_with(engine: socket.socket) -> None:
    """End this process when its engine is gone, even in the middle of a request."""
    hangup = getattr(select, "POLLRDHUP", select.POLLHUP)
    watch = select.poll()
    watch.register(engine.fileno(), hangup)
    watch.poll()
    os._exit(0)


def _serve(engine: socket.socket, running: memoryview) -> None:
    """Load the model, say how it stands, and answer until the engine is gone."""
    hello: Hello = decode_record(receive(engine), Hello)
    held: list[Resident] = []

    def begin() -> EngineResponse:
        register_ops(hello.begin.ops, hello.search)
        held.append(Resident(hello.begin, Settings.from_env(hello.env)))
        _note_runs(held[0], running)
        return held[0].state()

    send(engine, _try_answer(begin))
    while held:
        content = receive(engine)
        running[0] = 0
        send(engine, _try_answer(lambda: held[0].ask(decode_record(content, EngineRequest))))  # noqa: B023 - at once
        _note_runs(held[0], running)


def _note_runs(resident: Resident, running: memoryview) -> None:
    """Have each graph write its number, counted from one, where the engine reads it afterwards."""
    for graph in resident.graphs:
        if graph.note is None:
            graph.note = _make_note(running, resident.find_number(graph))


def _make_note(running: memoryview, number: int) -> Callable[[], None]:
    """What a graph calls before native code is entered."""

    def note() -> None:
        running[0] = number

    return note


def _try_answer(answer: Callable[[], EngineResponse]) -> EngineResponse:
    """A reply, or the error that was raised instead."""
    try:
        return answer()
    except HubaotiError as error:
        return Failed(type(error).__name__, str(error), error.hint)
    except Exception as error:  # which should not be; the worker goes on
        message = f"{type(error).__name__}: {first_line(error)}"
        return Failed("HubaotiError", message, "see whether --eager answers")
