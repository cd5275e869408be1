"""The two formats of a Xet upload: xorbs hold chunks, shards say which chunks make which file.

Only what an upload needs is read (the formats of hf_xet 1.x), and nothing is believed: every
length and offset is checked against the bytes that are there.

A xorb's hash is made from its chunks: a tree of keyed BLAKE3 hashes. Source:
https://huggingface.co/docs/xet/hashing; where the tree branches, as hf_xet 1.x does it (xet-core,
aggregated_hashes.rs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import blake3
import lz4.frame  # type: ignore[import-untyped]  # lz4 ships no types

from hubaoti.server.errors import ServerError

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

_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")

_LEAST, _MOST, _MEAN = 3, 9, 4
"""How many nodes have one parent: a row's last one may have fewer than the least."""


class BadXet(ServerError):
    """400: bytes that are no xorb or shard, or that lie about themselves."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


@dataclass(frozen=True, slots=True)
class _Chunk:
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


def read_chunks(xorb: BinaryIO, size: int) -> list[_Chunk]:
    """The chunks of a serialized xorb, by their heads; a footer may follow them.

    Raises:
        BadXet: a head is malformed, or its chunk leaves the file.
    """
    found: list[_Chunk] = []
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


def _parse_chunk_head(head: bytes, offset: int) -> _Chunk:
    stored, length = int.from_bytes(head[1:4], "little"), int.from_bytes(head[5:8], "little")
    scheme = head[4]
    sane = 0 < stored <= 2 * _MAX_CHUNK and 0 < length <= _MAX_CHUNK
    if head[0] != 0 or scheme > 2 or not sane:
        raise BadXet("not a chunk's head")
    return _Chunk(offset, scheme, stored, length)


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
    rows = _iterate_rows(shard)
    while (head := next(rows))[:32] != _END:
        flags, count = struct.unpack_from("<II", head, 32)
        segments = tuple(_parse_segment(next(rows)) for _ in range(count))
        if flags & _HAS_VERIFICATION:
            for _ in range(count):
                next(rows)
        sha256 = _format_hash(next(rows)) if flags & _HAS_SHA256 else None
        yield XetFile(sha256, segments)


def _iterate_rows(shard: bytes) -> Iterator[bytes]:
    """The 48-byte rows of a shard; whoever asks for more than there are is told."""
    for offset in range(_SHARD_HEAD, len(shard) - _ROW + 1, _ROW):
        yield shard[offset : offset + _ROW]
    raise BadXet("the shard is truncated")


def _parse_segment(row: bytes) -> Segment:
    _, length, first, last = struct.unpack_from("<IIII", row, 32)
    return Segment(_format_hash(row), length, first, last)


@dataclass(frozen=True, slots=True)
class Node:
    """A chunk, or some of them in a row: their hash, and how many bytes they hold."""

    hash: str
    size: int


def hash_chunk(content: bytes) -> Node:
    """A chunk's node: the keyed hash of its bytes, and their number."""
    return Node(_hash_keyed(_CHUNK_KEY, content), len(content))


def hash_leaves(leaves: Iterable[Node]) -> str:
    """The hash of all chunks, in their order; a single one's is its own."""
    row = list(leaves)
    while len(row) > 1:
        row = [_hash_family(family) for family in _split_families(row)]
    return row[0].hash


def _hash_family(family: list[Node]) -> Node:
    lines = "".join(f"{node.hash} : {node.size}\n" for node in family)
    return Node(_hash_keyed(_NODE_KEY, lines.encode()), sum(node.size for node in family))


def _split_families(row: list[Node]) -> Iterator[list[Node]]:
    """Cut a row into families by the nodes' own hashes: a change moves only the cuts near it."""
    family: list[Node] = []
    for node in row:
        family.append(node)
        ends = len(family) >= _LEAST and int(node.hash[-16:], 16) % _MEAN == 0
        if ends or len(family) == _MOST:
            yield family
            family = []
    if family:
        yield family


def _hash_keyed(key: bytes, content: bytes) -> str:
    return _format_hash(blake3.blake3(content, key=key).digest())


def _format_hash(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", raw))
