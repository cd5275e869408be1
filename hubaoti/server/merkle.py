"""A xorb's hash, made from its chunks: a tree of keyed BLAKE3 hashes.

Source: https://huggingface.co/docs/xet/hashing; where the tree branches, as hf_xet 1.x does it
(xet-core, aggregated_hashes.rs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import blake3

_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")

_LEAST, _MOST, _MEAN = 3, 9, 4
"""How many nodes have one parent: a row's last one may have fewer than the least."""


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
    return format_hash(blake3.blake3(content, key=key).digest())


def format_hash(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", raw))
