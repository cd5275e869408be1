"""What a source imports, and what its statements read: known by its text, and parsed once.

To parse the files of a model takes ten times as long as to attach its graphs. So whoever has a
place for notes lends it for a block; without one everything is worked out anew in each process.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Protocol

import msgspec

from hubaoti.compiler import words
from hubaoti.compiler.words import has_forward, reads_by_computed_name, words_in


class Notes(Protocol):
    """A place where small texts are kept by a digest, and may be forgotten; it never fails."""

    def noted(self, digest: str) -> bytes | None:
        """What was kept."""

    def note(self, found: Mapping[str, bytes]) -> None:
        """Keep them, if that can be."""


class Import(msgspec.Struct, frozen=True, array_like=True):
    """The modules of an `import`; or of a `from`, whose `level` counts dots, its names here."""

    names: tuple[str, ...]
    module: str = ""
    level: int | None = None


class Statement(msgspec.Struct, frozen=True, array_like=True):
    """A statement at the top: the class that it is, if it is one, and what its code reads."""

    defines: str
    has_forward: bool
    words: frozenset[str]
    by_computed_name: bool
    methods: frozenset[str]  # what the methods of a class read


class Parsed(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a source by its text alone."""

    imports: tuple[Import, ...]
    statements: tuple[Statement, ...]


DECODER = msgspec.json.Decoder(Parsed)
# Whoever lends them in this context, and what is to be kept there at its end.
LENT: ContextVar[tuple[Notes, dict[str, bytes]] | None] = ContextVar("lent", default=None)


@contextmanager
def lending(notes: Notes) -> Iterator[None]:
    """Look there first in the block, and keep there what had to be worked out."""
    new: dict[str, bytes] = {}
    before = LENT.set((notes, new))
    try:
        yield
    finally:
        LENT.reset(before)
        if new:
            notes.note(new)


@lru_cache(maxsize=128)
def parsed(text: str) -> Parsed:
    """What a text imports and reads; kept, because models of one kind share files."""
    lent = LENT.get()
    if lent is None or not (rules := digest_of_rules()):
        return read(text)
    notes, new = lent
    digest = hashlib.sha256(f"{rules}\0{text}".encode()).hexdigest()
    try:
        return DECODER.decode(notes.noted(digest) or b"")
    except (msgspec.DecodeError, UnicodeError):
        found = read(text)
        with suppress(UnicodeError):  # half of a character, which no JSON has
            new[digest] = msgspec.json.encode(found)
        return found


def read(text: str) -> Parsed:
    """The same, parsed."""
    body = ast.parse(text).body
    return Parsed(tuple(imports_in(body)), tuple(map(read_statement, body)))


def read_statement(node: ast.stmt) -> Statement:
    """One statement at the top."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    methods = [words_in(each) for each in body if isinstance(each, ast.FunctionDef)]
    return Statement(
        node.name if isinstance(node, ast.ClassDef) else "",
        has_forward(node),
        words_in(node),
        reads_by_computed_name(node),
        frozenset[str]().union(*methods),
    )


def imports_in(body: list[ast.stmt]) -> Iterator[Import]:
    """The imports that run when a module is imported."""
    for node in statements(body):
        if isinstance(node, ast.Import):
            yield Import(tuple(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.asname or alias.name for alias in node.names)
            yield Import(names, node.module or "", node.level)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, `if TYPE_CHECKING` left out."""
    for node in body:
        yield node
        if isinstance(node, ast.Try):
            yield from statements([*node.body, *node.orelse])
            yield from statements([each for handler in node.handlers for each in handler.body])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from statements([*node.body, *node.orelse])


@cache
def digest_of_rules() -> str:
    """What stands for how a text is read: this file, `words`, Python's grammar; or nothing."""
    try:
        ours = [inspect.getsource(module) for module in (sys.modules[__name__], words)]
    except OSError:  # installed without sources
        return ""
    whole = "\0".join([*ours, *map(str, sys.version_info[:2])])
    return hashlib.sha256(whole.encode()).hexdigest()
