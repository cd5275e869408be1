"""Connections that cost little: so many at once, a head in so many seconds, few lines of log.

Whoever only opens connections is not let keep others out: the one that has waited longest with no
request, or half of one, makes room for the next.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512
"""Connections at a time, where the system lets a process have three times as many files open."""

HEAD_SECONDS = 10.0
"""From a connection's start, or its last answer, until all of a request's head is here."""

AT_ONCE = 10
"""Connections that asyncio takes before it looks after those it has, and the lines that it logs
when it can take none: uvicorn's `backlog`, but for the queue of the system."""

QUEUE = 512
"""Connections that wait in the system until we take them."""

_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Connection(H11Protocol):
    """uvicorn's connection (checked with 0.35 to 0.54), which waits for a head only so long."""

    _since = 0.0
    _timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered: none has come, or only a part of its head."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, if there is room or room can be made."""
        super().connection_made(transport)
        self._watch()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        """Take some bytes of a request; a whole head ends the wait for it."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The next head has its time from now on."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for no head any more: there is no connection."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if not self.is_waiting or self.transport.is_closing():
            self._stop()
        elif self._timer is None:
            self._since = time.monotonic()
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_room(self) -> None:
        held = [each for each in self.connections if isinstance(each, Connection)]
        held = [each for each in held if not each.transport.is_closing()]
        if len(held) <= _choose_connection_limit():
            return
        waiting = [each for each in held if each.is_waiting and each is not self]
        if waiting:
            min(waiting, key=lambda each: each._since).transport.abort()
        else:
            self.transport.write(_BUSY)
            self.transport.close()


def _choose_connection_limit() -> int:
    """How many connections may be open: of the files that a process may have, a third at most."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = files == resource.RLIM_INFINITY
    return MOST_CONNECTIONS if unlimited else min(MOST_CONNECTIONS, files // 3)


class Seldom(logging.Filter):
    """Lets so many records through in so many seconds, and says how many it kept back."""

    def __init__(self, most: int = 20, seconds: float = 10.0) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds
        self._start, self._count = time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is printed; the first of a new span says how many were not."""
        now = time.monotonic()
        if now - self._start > self._seconds:
            left_out, self._start, self._count = self._count - self._most, now, 0
            if left_out > 0:
                record.msg = f"{record.getMessage()} ({left_out} lines before it were left out)"
                record.args = ()
        self._count += 1
        return self._count <= self._most


@contextmanager
def limit_log_lines() -> Iterator[None]:
    """While a server runs: what clients cause fills no disk with lines of the log."""
    loggers, seldom = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")], Seldom()
    for logger in loggers:
        logger.addFilter(seldom)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(seldom)
