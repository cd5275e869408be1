"""The process of one model: it loads it, answers one request after the other, and ends with its
engine. What crashes here, or takes too much memory, ends nobody else.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from hubaoti.engines.local import Resident
from hubaoti.engines.messages import EngineRequest, EngineResponse, Hello
from hubaoti.errors import BadRequest, HubaotiError, first_line
from hubaoti.host.confinement import guard_worker
from hubaoti.host.processes import end_with_parent, join_parent
from hubaoti.host.wire import Channel, ErrorRecord, Garbled, Gone
from hubaoti.runtime.custom_ops import register_ops
from hubaoti.settings import Settings

# The system ends this process for memory before it ends the engine (proc(5)).
_FIRST_TO_GO = "500"
# Below the user's home: of triton, of transformers for a model's own code, of torch for ops.
_CACHES = (".triton", ".cache/huggingface", ".cache/torch_extensions")


def main() -> None:
    """The worker: its note of running graphs is on the command line, by number."""
    engine = join_parent(is_watched=False)
    running = memoryview(mmap.mmap(int(sys.argv[3]), mmap.PAGESIZE)).cast("I")
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    with suppress(Gone):
        _serve(engine, running)
    os._exit(0)  # without waiting for what libraries do at their end


def _serve(engine: Channel, running: memoryview) -> None:
    """Load the model, say how it stands, and answer until the engine is gone."""
    hello: Hello = engine.receive(Hello)
    settings = Settings.from_env(hello.env)
    _make_caches()
    # The mirror stays writable: what first opens come to is kept there. Its engine has fetched all
    # files of a model, but for code of its own that lies in another repo.
    guard_worker(settings.trust, network=hello.begin.trust_remote_code)
    end_with_parent(engine)
    loaded: list[Resident] = []

    def load() -> EngineResponse:
        register_ops(hello.begin.ops, hello.search)
        loaded.append(Resident(hello.begin, settings))
        return loaded[0].state()

    def answer() -> EngineResponse:
        try:
            request: EngineRequest = engine.receive(EngineRequest)
        except Garbled as error:
            if error.__cause__ is None:  # no record at all: nothing behind it can be read
                raise
            raise BadRequest(
                f"what is asked is malformed: {error.__cause__}", hint="give plain texts"
            ) from error
        running[0] = 0
        return loaded[0].ask(request)

    engine.send(_try_answer(load))
    while loaded:
        _note_runs(loaded[0], running)
        engine.send(_try_answer(answer))


def _make_caches() -> None:
    """Make the folders that libraries make beside ours, where nothing new can be made soon."""
    for name in _CACHES:
        with suppress(OSError, RuntimeError):
            (Path.home() / name).mkdir(parents=True, exist_ok=True)


def _note_runs(resident: Resident, running: memoryview) -> None:
    """Have each graph write its number, counted from one, where the engine reads it afterwards.

    It does so before native code is entered.
    """
    for graph in resident.graphs:
        if graph.note is None:
            graph.note = partial(running.__setitem__, 0, resident.find_number(graph))


def _try_answer(answer: Callable[[], EngineResponse]) -> EngineResponse:
    """A reply, or the error that was raised instead."""
    try:
        return answer()
    except HubaotiError as error:
        return ErrorRecord.of(error)
    except Gone:
        raise
    except Exception as error:  # which should not be; the worker goes on
        message = f"{type(error).__name__}: {first_line(error)}"
        return ErrorRecord("HubaotiError", message, "see whether --eager answers")
