"""Records between processes: MessagePack, each with its length before it; errors among them."""

from __future__ import annotations

import math
import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from hubaoti.errors import BadRequest, HubaotiError, rebuild_error

LENGTH = struct.Struct("<Q")
LARGEST_RECORD = 1 << 30  # bytes of a record
_GLANCE = 20  # milliseconds between two looks whether anything can still come


class Gone(Exception):
    """Nobody is at the other end any more, or nobody whose records can be read."""


class Garbled(Gone):
    """What came is no record, or none of the kind that was expected."""


class ErrorRecord(msgspec.Struct, frozen=True, tag=True):
    """An error as another process is told of it: its class, words and hint, and notes on it."""

    kind: str
    message: str
    hint: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: HubaotiError, *notes: str) -> ErrorRecord:
        """The record of an error of ours."""
        return cls(type(error).__name__, str(error), error.hint, notes)

    @classmethod
    def keep(cls, error: HubaotiError) -> ErrorRecord:
        """The record of an error of ours with the notes that it has."""
        return cls.of(error, *error.notes)

    def rebuild(self) -> HubaotiError:
        """The error, as it was there."""
        error = rebuild_error(self.kind, self.message, self.hint)
        for note in self.notes:
            error.add_note(note)
        return error


class Channel:
    """One end of a pair of sockets, over which records of at most `most` bytes go both ways.

    `is_over` is asked, as long as nothing comes, whether anything still can. `received` counts the
    bytes that came.
    """

    def __init__(
        self,
        end: socket.socket,
        most: int = LARGEST_RECORD,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        self.received = 0
        self._socket = end
        self._most = most
        self._is_over = is_over

    def send(self, record: object, seconds: float | None = None) -> None:
        """Send a record, which has to be taken within `seconds`.

        Raises:
            BadRequest: it holds what no record can, as half a character, or too much; nothing was
                sent.
            Gone: nobody takes it.
        """
        try:
            content = msgspec.msgpack.encode(record)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(
                f"what is asked cannot be sent to another process: {error}", hint="give plain texts"
            ) from error
        if len(content) > self._most:
            raise BadRequest(
                f"{len(content) / 1e9:.1f} GB are too much for one answer or question of a process",
                hint="ask for fewer at a time",
            )
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(LENGTH.pack(len(content)) + content)
        except OSError as error:
            raise Gone(str(error)) from error

    def receive(self, kind: Any, until: float = math.inf) -> Any:
        """Wait for a record of a kind, which may be a union of some, until a time (`monotonic`).

        Raises:
            Gone: none comes any more. Garbled: what comes is none.
            HubaotiError: an `ErrorRecord` came; it is raised as what it was.
        """
        (length,) = LENGTH.unpack(self._take(LENGTH.size, until))
        if length > self._most:
            raise Garbled("it said what is no record")
        record = decode_record(self._take(length, until), kind)
        if isinstance(record, ErrorRecord):
            raise record.rebuild()
        return record

    def _take(self, size: int, until: float) -> bytes:
        """Wait for exactly `size` bytes."""
        content = bytearray()
        asks = self._is_over is not None or until < math.inf  # else it is waited for by the system
        while len(content) < size:
            if time.monotonic() > until:
                raise Gone("")
            if not self.is_readable(_GLANCE if asks else None):
                if self._is_over is not None and self._is_over() and not self.is_readable():
                    raise Gone("")
                continue
            part = b""
            with suppress(OSError):  # it is closed, and has not even read all
                part = self._socket.recv(min(size - len(content), 1 << 20))
            if not part:
                raise (
                    Garbled("it said half a record") if content else Gone("the other end is closed")
                )
            content += part
            self.received += len(part)
        return bytes(content)

    def is_readable(self, milliseconds: int | None = 0) -> bool:
        """Whether something lies here to be received, or an end is closed; None waits for it."""
        if self._socket.fileno() < 0:  # another thread closed it
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(milliseconds))

    def wait_for_hangup(self) -> None:
        """Wait until the other end is closed, whatever is sent meanwhile."""
        poll = select.poll()
        poll.register(self._socket, getattr(select, "POLLRDHUP", select.POLLHUP))
        poll.poll()

    def hang_up(self) -> None:
        """Say to the other end that nothing more comes, and that nothing is listened to."""
        with suppress(OSError):  # it was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give its descriptor back."""
        self._socket.close()


def decode_record(content: bytes, kind: Any) -> Any:
    """A record of a kind.

    Raises:
        Garbled: it is none.
    """
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        raise Garbled("it said what is no answer") from error
