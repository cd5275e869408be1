"""A first open, in the child that does it: its fork is confined and opens graphs, and what they
answer is compared out here.

So a graph's library has nothing of the parent's, and no word that it says makes a verdict: the fork
says what it did and hands answers over, within bounds, and how it ended is seen from outside.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from hubaoti.errors import HubaotiError, NotTried
from hubaoti.host.confinement import ROOM, Confinement
from hubaoti.host.memory import is_limited, list_descendants, measure_process_memory
from hubaoti.host.processes import die_with_parent, end_with_parent
from hubaoti.host.wire import Channel, ErrorRecord, Garbled, Gone
from hubaoti.runtime.custom_ops import register_ops
from hubaoti.runtime.open_child import OpenReport, OpenRequest

MOST = 1 << 20  # bytes that a fork may say beside answers
_INTERVAL = 0.5  # seconds between two looks at its memory
_NO_ANSWER = "its process said what is no answer of ours"


class Step(msgspec.Struct, frozen=True):
    """What a fork says of a graph: that it begins with its kernels, or with itself, has opened it;
    and at last its `answers`, or the `error` that it met."""

    graph: str
    opened: bool = False
    of_kernel: bool = False
    answers: bytes | None = None
    error: ErrorRecord | None = None


@dataclass(slots=True)
class Attempt:
    """A graph that a fork opens, and says so: at a crash its last word stands."""

    graph: str
    channel: Channel
    opened: bool = False

    def begin(self, *, of_kernel: bool = False) -> None:
        """From now on the graph is blamed for what happens, or first a kernel that it calls."""
        self.channel.send(Step(self.graph, self.opened, of_kernel))

    def note_opened(self) -> None:
        """It is open, and is called next."""
        self.opened = True
        self.begin()


@dataclass(frozen=True, slots=True)
class FirstOpen:
    """How graphs are tried: in the fork each is opened (`try_graph`), which begins its attempt
    right before that, and gives its answers; outside of it they are compared (`judge`).

    The fork may read the `readable` folders, and its answers have `most` bytes. It may start
    processes where it `compiles`.
    """

    try_graph: Callable[[Attempt], bytes]
    judge: Callable[[str, bytes], OpenReport]
    readable: Sequence[Path] = ()
    most: int = 0
    compiles: bool = False

    def report(self, channel: Channel, request: OpenRequest) -> None:
        """Try all graphs of a request, and tell the parent what came of each.

        It has not been watched so far. What ends the fork ends this process, too, the same way.
        """
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        if not (fork := os.fork()):
            die_with_parent(parent)
            channel.close()
            ours.close()
            _run(lambda: self._try_all(Channel(theirs), request))
        theirs.close()
        end_with_parent(channel)
        watch = _Watch(fork, request.memory + ROOM)
        inner = Channel(ours, MOST + self.most, watch.has_ended)
        for graph in request.ids:
            self._relay(graph, inner, channel, watch)

    def _relay(self, graph: str, inner: Channel, outer: Channel, watch: _Watch) -> None:
        """Tell the parent how a graph fares, until it is through."""
        last, was_of_kernel = OpenReport(graph), True
        try:
            while last.problem is None:
                step: Step = inner.receive(Step)
                # What a graph says once it has begun with itself blames no kernel.
                is_wrong = step.graph != graph or (step.of_kernel and not was_of_kernel)
                if is_wrong or inner.received > MOST + self.most:
                    raise Garbled(_NO_ANSWER)
                was_of_kernel = step.of_kernel
                last = self._read(step)
                outer.send(last)
        except Garbled:
            outer.send(_refuse(last, NotTried(_NO_ANSWER)))
            os._exit(0)  # nothing that comes after is heard
        except Gone:
            _end_as(watch.wait())

    def _read(self, step: Step) -> OpenReport:
        """What a step says to the parent, with the answers compared."""
        begun = OpenReport(
            step.graph, is_limited=is_limited(), opened=step.opened, of_kernel=step.of_kernel
        )
        if step.error is not None:
            return msgspec.structs.replace(begun, problem=step.error.message, error=step.error)
        if step.answers is None:
            return begun
        try:
            return self.judge(step.graph, step.answers)
        except HubaotiError as error:
            return _refuse(begun, error)

    def _try_all(self, channel: Channel, request: OpenRequest) -> None:
        """In the fork: import what the caller named, be confined, and try each graph.

        What keeps the caller's modules from being imported says nothing of a graph.
        """
        try:
            register_ops(request.ops, request.search)
        except HubaotiError as error:
            for graph in request.ids:
                channel.send(Step(graph, error=ErrorRecord(NotTried.__name__, f"{error}")))
            return
        self._confine(request)
        for graph in request.ids:
            attempt = Attempt(graph, channel)
            try:
                answers = self.try_graph(attempt)
                channel.send(Step(graph, attempt.opened, answers=answers))
            except HubaotiError as error:
                channel.send(Step(graph, attempt.opened, error=ErrorRecord.of(error)))

    def _confine(self, request: OpenRequest) -> None:
        """Be left with what graphs need; where a caller's modules are, they may be read."""
        search = [Path(os.fsdecode(each)) for each in request.search] if request.ops else []
        Confinement(
            readable=(*self.readable, *search),
            scratch=Path(os.fsdecode(request.scratch)),
            memory=request.memory,
            seconds=request.seconds,
            uses_gpu=request.device.startswith("cuda"),
            processes=self.compiles or bool(request.ops),
        ).enter()


@dataclass(slots=True)
class _Watch:
    """A fork whose memory is looked at while it is waited for: for a GPU there is no other limit.

    With all that it started it may take `most` bytes.
    """

    fork: int
    most: int
    due: float = 0.0
    status: int | None = None

    def has_ended(self) -> bool:
        """Whether it has ended; what takes too much is."""
        if self.status is None and time.monotonic() > self.due:
            self.due = time.monotonic() + _INTERVAL
            if sum(map(measure_process_memory, list_descendants(str(self.fork)))) > self.most:
                os.kill(self.fork, signal.SIGKILL)
        if self.status is None:
            found, status = os.waitpid(self.fork, os.WNOHANG)
            self.status = status if found else None
        return self.status is not None

    def wait(self) -> int:
        """End it, if it has not yet; its exit code, as `subprocess` has it."""
        if not self.has_ended():
            os.kill(self.fork, signal.SIGKILL)
            _, self.status = os.waitpid(self.fork, 0)
        assert self.status is not None
        return os.waitstatus_to_exitcode(self.status)


def _refuse(report: OpenReport, error: HubaotiError) -> OpenReport:
    """A graph's last report, with what is wrong."""
    return msgspec.structs.replace(report, problem=f"{error}", error=ErrorRecord.of(error))


def _run(work: Callable[[], None]) -> NoReturn:
    """Do some work in a fork, and end with it."""
    code = 1
    try:
        work()
        code = 0
    except Exception:  # its last line is told
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end_as(code: int) -> NoReturn:
    """End as another process did."""
    if code < 0:
        with suppress(OSError):  # SIGKILL has no other effect anyway
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))
