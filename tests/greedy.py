"""A first open of what takes more than it may, in the place of a graph: its name says what.

python -P -c "from greedy import main; main()"     # as `collect_verdicts` runs it
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable

import msgspec

from hubaoti.errors import HubaotiError
from hubaoti.host.processes import join_parent
from hubaoti.runtime import open_fork
from hubaoti.runtime.open_child import OpenReport, OpenRequest
from hubaoti.runtime.open_fork import Attempt, FirstOpen

ROOM = 200 << 20  # bytes that are allowed here, a hundredth of what torch may take
NOBODY = 54321  # a user who runs nothing else
_PR_SET_DUMPABLE = 4  # linux/prctl.h


def touch(size: int, seconds: float = 60.0) -> None:
    """Have so many bytes for a while."""
    taken = bytearray(os.urandom(1 << 20)) * (size >> 20)
    time.sleep(seconds)
    del taken


def touch_little() -> None:
    touch(60 << 20, 1.5)


def touch_much() -> None:
    touch(300 << 20)


def start_what_touches_much() -> None:
    if not os.fork():
        touch(300 << 20)
        os._exit(0)
    time.sleep(60.0)


def compute() -> None:
    while True:
        pass


def fork_without_end() -> None:
    """Tells how many processes there could be."""
    started = list[int]()
    try:
        while len(started) < 1000:
            if not (child := os.fork()):
                time.sleep(60.0)
                os._exit(0)
            started.append(child)
    except OSError as error:
        raise HubaotiError(f"started {len(started)}: {error.strerror}") from error
    finally:
        for child in started:
            os.kill(child, signal.SIGKILL)
    raise HubaotiError(f"started {len(started)}")


WORKS: dict[str, Callable[[], None]] = {
    work.__name__: work
    for work in (touch_little, touch_much, start_what_touches_much, compute, fork_without_end)
}


def become_nobody() -> None:
    """Be no root any more, whose processes nobody counts."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # so that /proc says whose this one is


def main() -> None:
    """The child; on one core it may compute for a hundredth of the time that it is waited for."""
    channel = join_parent(is_awaited=True, is_watched=False)
    request: OpenRequest = channel.receive(OpenRequest)
    open_fork.ROOM = ROOM  # type: ignore[misc]
    if request.ids == [fork_without_end.__name__] and os.geteuid() == 0:
        become_nobody()

    def try_graph(attempt: Attempt) -> bytes:
        attempt.begin()
        WORKS[attempt.graph]()
        return b""

    def judge(graph: str, _: bytes) -> OpenReport:
        return OpenReport(graph, "", opened=True)

    request = msgspec.structs.replace(request, seconds=request.seconds / 100)
    FirstOpen(try_graph=try_graph, judge=judge, compiles=True).report(channel, request)
