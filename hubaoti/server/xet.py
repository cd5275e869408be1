"""The two formats of a Xet upload: xorbs hold chunks, shards say which chunks make which file.

Only what an upload needs is read (the formats of hf_xet 1.x), and nothing is believed: every
length and offset is checked against the bytes that are there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import lz4.frame  # type: ignore[import-untyped]  # lz4 ships no types

from hubaoti.server.merkle import format_hash

MAX_XORB = 80 * 2**20
"""A xorb's bytes at most: hf_xet's limit is 64 MiB before its headers."""

MAX_SHARD = 128 * 2**20
"""A shard's bytes at most: hf_xet cuts them at 64 MiB."""

_MAX_CHUNK = 2**20
_MAX_CHUNKS = 64 * 1024
_CHUNK_HEAD = 8
_FOOTER = b"XETBLOB"
_SHARD_MAGIC = b"HFRepoMetaData"
_SHARD_HEAD = 48
_ROW = 48
_END = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30


class BadXet(ValueError):
    """Bytes that are no xorb or shard, or that lie about themselves."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a chunk's head lies in its xorb, how its bytes are stored, and how many they become."""

    offset: int
    scheme: int
    stored: int
    length: int


@dataclass(frozen=True, slots=True)
class Segment:
    """The chunks `first` to `last` (not included) of a xorb: `length` bytes of a file."""

    xorb: str
    length: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class XetFile:
    """A file as its segments, and the digest that its sender gives it."""

    sha256: str | None
    segments: tuple[Segment, ...]


def read_chunks(xorb: BinaryIO, size: int) -> list[Chunk]:
    """The chunks of a serialized xorb, by their heads; a footer may follow them.

    Raises:
        BadXet: a head is malformed, or its chunk leaves the file.
    """
    found: list[Chunk] = []
    offset = 0
    while offset < size:
        head = _read_exactly(xorb, offset, _CHUNK_HEAD)
        if head.startswith(_FOOTER):
            break
        chunk = _parse_chunk_head(head, offset)
        offset += _CHUNK_HEAD + chunk.stored
        if offset > size or len(found) == _MAX_CHUNKS:
            raise BadXet(f"the xorb's chunk {len(found)} leaves its bounds")
        found.append(chunk)
    if not found:
        raise BadXet("the xorb holds no chunk")
    return found


def read_chunk(xorb: BinaryIO, offset: int) -> bytes:
    """The bytes of the chunk whose head lies at this offset.

    Raises:
        BadXet: they do not unpack to the length that the head names.
    """
    chunk = _parse_chunk_head(_read_exactly(xorb, offset, _CHUNK_HEAD), offset)
    stored = xorb.read(chunk.stored)
    if chunk.scheme == 0:
        content = stored
    elif chunk.scheme == 1:
        content = _unpack(stored, chunk.length)
    else:
        content = _ungroup(_unpack(stored, chunk.length))
    if len(content) != chunk.length:
        raise BadXet("a chunk has another length than its head says")
    return content


def _read_exactly(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    found = file.read(length)
    if len(found) != length:
        raise BadXet("the xorb is truncated")
    return found


def _parse_chunk_head(head: bytes, offset: int) -> Chunk:
    stored, length = int.from_bytes(head[1:4], "little"), int.from_bytes(head[5:8], "little")
    scheme = head[4]
    sane = 0 < stored <= 2 * _MAX_CHUNK and 0 < length <= _MAX_CHUNK
    if head[0] != 0 or scheme > 2 or not sane:
        raise BadXet("not a chunk's head")
    return Chunk(offset, scheme, stored, length)


def _unpack(stored: bytes, length: int) -> bytes:
    try:
        # One byte of room more than promised: enough to see a lie, too little for a bomb.
        unpacked: bytes = lz4.frame.LZ4FrameDecompressor().decompress(stored, max_length=length + 1)
    except RuntimeError as error:
        raise BadXet(f"a chunk does not unpack: {error}") from None
    return unpacked


def _ungroup(planes: bytes) -> bytes:
    """Undo byte grouping: byte i of every group of four stands in plane i."""
    content, start = bytearray(len(planes)), 0
    for plane in range(4):
        length = (len(planes) - plane + 3) // 4
        content[plane::4] = planes[start : start + length]
        start += length
    return bytes(content)


def read_files(shard: bytes) -> Iterator[XetFile]:
    """The files that a shard describes.

    Raises:
        BadXet: it is no shard, or truncated.
    """
    if len(shard) < _SHARD_HEAD or not shard.startswith(_SHARD_MAGIC):
        raise BadXet("not a shard")
    rows = _Rows(shard)
    while (head := rows.next())[:32] != _END:
        flags, count = struct.unpack_from("<II", head, 32)
        segments = tuple(_parse_segment(rows.next()) for _ in range(count))
        if flags & _HAS_VERIFICATION:
            rows.skip(count)
        sha256 = format_hash(rows.next()) if flags & _HAS_SHA256 else None
        yield XetFile(sha256, segments)


class _Rows:
    """The 48-byte rows of a shard, one after the other."""

    def __init__(self, shard: bytes) -> None:
        self._shard = shard
        self._offset = _SHARD_HEAD

    def next(self) -> bytes:
        row = self._shard[self._offset : self._offset + _ROW]
        if len(row) != _ROW:
            raise BadXet("the shard is truncated")
        self._offset += _ROW
        return row

    def skip(self, count: int) -> None:
        self._offset += count * _ROW


def _parse_segment(row: bytes) -> Segment:
    _, length, first, last = struct.unpack_from("<IIII", row, 32)
    return Segment(format_hash(row), length, first, last)
