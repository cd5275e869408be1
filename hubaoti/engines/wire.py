"""Records between an engine and its workers: MessagePack, each with its length before it."""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

LENGTH = struct.Struct("<Q")


class Gone(Exception):
    """Nobody is at the other end any more."""


def send(to: socket.socket, record: object) -> None:
    """Send a record.

    Raises:
        Gone: nobody takes it.
    """
    content = msgspec.msgpack.encode(record)
    try:
        to.sendall(LENGTH.pack(len(content)) + content)
    except OSError as why:
        raise Gone(str(why)) from why


def receive(from_: socket.socket, kind: Any) -> Any:
    """Wait for a record of a kind, which may be a union of some.

    Raises:
        Gone: none comes any more.
    """
    (length,) = LENGTH.unpack(taken(from_, LENGTH.size))
    return msgspec.msgpack.decode(taken(from_, length), type=kind)


def taken(from_: socket.socket, size: int) -> bytes:
    """So many bytes."""
    content = bytearray()
    while len(content) < size:
        try:
            part = from_.recv(min(size - len(content), 1 << 20))
        except OSError as why:
            raise Gone(str(why)) from why
        if not part:
            raise Gone("the other end is closed")
        content += part
    return bytes(content)
