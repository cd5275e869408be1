"""Records between an engine and its workers: MessagePack, each with its length before it."""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

from hubaoti.errors import BadRequest

LENGTH = struct.Struct("<Q")
LARGEST_RECORD = 1 << 30  # bytes of a record


class Gone(Exception):
    """Nobody is at the other end any more, or nobody whose records can be read."""


def send(to: socket.socket, record: object) -> None:
    """Send a record.

    Raises:
        BadRequest: it holds what no record can, as half a character, or too much; nothing was sent.
        Gone: nobody takes it.
    """
    try:
        content = msgspec.msgpack.encode(record)
    except (TypeError, ValueError, OverflowError) as why:
        raise BadRequest(
            f"what is asked cannot be sent to another process: {why}", hint="give plain texts"
        ) from why
    if len(content) > LARGEST_RECORD:
        raise BadRequest(
            f"{len(content) / 1e9:.1f} GB are too much for one answer or question of a process",
            hint="ask for fewer at a time",
        )
    try:
        to.sendall(LENGTH.pack(len(content)) + content)
    except OSError as why:
        raise Gone(str(why)) from why


def receive(from_: socket.socket) -> bytes:
    """Wait for a record.

    Raises:
        Gone: none comes any more, or none that can be one.
    """
    (length,) = LENGTH.unpack(_receive_bytes(from_, LENGTH.size))
    if length > LARGEST_RECORD:
        raise Gone("it said what is no record")
    return _receive_bytes(from_, length)


def decode_record(content: bytes, kind: Any) -> Any:
    """A record of a kind, which may be a union of some.

    Raises:
        BadRequest: it is none.
    """
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except msgspec.MsgspecError as why:
        raise BadRequest(f"what is asked is malformed: {why}", hint="give plain texts") from why


def _receive_bytes(from_: socket.socket, size: int) -> bytes:
    """Wait for exactly `size` bytes.

    Raises:
        Gone: the other end closes before the last.
    """
    content = bytearray()
    while len(content) < size:
        try:
            part = from_.recv(min(size - len(content), 1 << 20))
        except OSError as error:
            raise Gone(str(error)) from error
        if not part:
            raise Gone("the other end is closed")
        content += part
    return bytes(content)
