"""What a source imports, and what its statements read: known by its text, and parsed once.

To parse the files of a model takes ten times as long as to attach its graphs. So whoever has a
place for notes lends it for a block; without one everything is worked out anew in each process.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Protocol

import msgspec

from hubaoti.program import names_read
from hubaoti.program.names_read import collect_names_read, reads_by_computed_name


class Notes(Protocol):
    """A place where small texts are kept by a digest, and may be forgotten; it never fails."""

    def read_note(self, digest: str) -> bytes | None:
        """What was kept under a digest; None where nothing is known of it."""

    def note(self, found: Mapping[str, bytes]) -> None:
        """Keep each text under its digest, where there is room."""


class Import(msgspec.Struct, frozen=True, array_like=True):
    """The modules of an `import`; or of a `from`, whose `level` counts dots, its names here."""

    names: tuple[str, ...]
    module: str = ""
    level: int | None = None
    originals: tuple[str, ...] = ()  # the names there; of an `import`, those that it binds here

    def resolve(self, package: str | None) -> tuple[str, ...]:
        """The absolute names of the modules that it names, in a module of a package."""
        if self.level is None:
            return self.names
        outer = (package or "").split(".")
        outer = outer[: len(outer) + 1 - self.level] if self.level else []
        return (".".join([*outer, *filter(None, [self.module])]),)


class Statement(msgspec.Struct, frozen=True, array_like=True):
    """A statement at the top: the class that it is, if it is one, and what its code reads."""

    defines: str
    has_forward: bool  # of a class, which is mixed into modules
    words: frozenset[str]
    by_computed_name: bool
    methods: frozenset[str]  # what the methods of a class read


class Parsed(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a source by its text alone."""

    imports: tuple[Import, ...]
    statements: tuple[Statement, ...]
    # Expressions of values and containers, by `name` and `Class.name`; for a function's name with
    # the endings of `DEFAULTS` those of its arguments.
    assigned: dict[str, str]


_SIMPLE = (
    ast.Constant, ast.Name, ast.Attribute, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.UnaryOp,
    ast.BinOp, ast.expr_context, ast.operator, ast.unaryop,
)  # fmt: skip
DEFAULTS = ("()", "(*)")  # of arguments by place, and of those by name
_DECODER = msgspec.json.Decoder(Parsed)
# Whoever lends them in this context, and what is to be kept there at its end.
_LENT: ContextVar[tuple[Notes, dict[str, bytes]] | None] = ContextVar("lent", default=None)


@contextmanager
def use_scan_cache(notes: Notes) -> Iterator[None]:
    """Look there first in the block, and keep there what had to be worked out."""
    new: dict[str, bytes] = {}
    before = _LENT.set((notes, new))
    try:
        yield
    finally:
        _LENT.reset(before)
        if new:
            notes.note(new)


@lru_cache(maxsize=128)
def scan_source(text: str) -> Parsed:
    """What a text imports and reads; kept, because models of one kind share files."""
    lent = _LENT.get()
    if lent is None or not (rules := digest_scan_rules()):
        return parse_source(text)
    notes, new = lent
    digest = hashlib.sha256(f"{rules}\0{text}".encode()).hexdigest()
    try:
        return _DECODER.decode(notes.read_note(digest) or b"")
    except (msgspec.DecodeError, UnicodeError):
        found = parse_source(text)
        with suppress(UnicodeError):  # half of a character, which no JSON has
            new[digest] = msgspec.json.encode(found)
        return found


def parse_source(text: str) -> Parsed:
    """What a text imports and reads, worked out anew.

    Raises:
        SyntaxError: this Python cannot parse it.
    """
    body = ast.parse(text).body
    return Parsed(
        tuple(_find_imports(body)), tuple(map(_read_statement, body)), dict(_find_assignments(body))
    )


def _read_statement(node: ast.stmt) -> Statement:
    """What a statement at the top defines, and what its code reads."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    methods = [each for each in body if isinstance(each, ast.FunctionDef)]
    return Statement(
        node.name if isinstance(node, ast.ClassDef) else "",
        any(each.name == "forward" for each in methods),
        collect_names_read(node),
        reads_by_computed_name(node),
        frozenset[str]().union(*map(collect_names_read, methods)),
    )


def _find_imports(body: list[ast.stmt]) -> Iterator[Import]:
    """The imports that run when a module is imported."""
    for node in _walk_statements(body):
        if isinstance(node, ast.Import):
            names = tuple(alias.name for alias in node.names)
            bound = tuple(each.asname or each.name.partition(".")[0] for each in node.names)
            yield Import(names, originals=bound)
        elif isinstance(node, ast.ImportFrom):
            bound = tuple(alias.asname or alias.name for alias in node.names)
            names = tuple(alias.name for alias in node.names)
            yield Import(bound, node.module or "", node.level, names)


def _find_assignments(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The names that are given a value once and for all, with the expression of it.

    Left out is what more than a look at other names decides.
    """
    own = [*_walk_statements(body)]
    pairs = [pair for node in own for pair in _list_targets(node)]
    counts = Counter(name for name, _ in pairs)
    for name, value in pairs:
        if counts[name] == 1 and is_simple(value):
            yield prefix + name, ast.unparse(value)
    for node in own:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _find_defaults(node, prefix + node.name)
        elif isinstance(node, ast.ClassDef):
            yield from _find_assignments(node.body, f"{prefix}{node.name}.")


def _find_defaults(
    node: ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    """The defaults of a function's arguments, where they are simple."""
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    named = {arg.arg: value for arg, value in pairs if value is not None}
    keys: list[ast.expr | None] = [ast.Constant(each) for each in named]
    both = (ast.Tuple(node.args.defaults, ast.Load()), ast.Dict(keys, [*named.values()]))
    for end, value in zip(DEFAULTS, both, strict=True):
        if is_simple(value):
            yield name + end, ast.unparse(value)


def _list_targets(node: ast.stmt) -> list[tuple[str, ast.expr]]:
    """The names that an assignment gives a value."""
    if isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name):
        return [(node.target.id, node.value)]
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        return [(node.target.id, node.value)] * 2
    if isinstance(node, ast.Assign):
        return [(each.id, node.value) for each in node.targets if isinstance(each, ast.Name)]
    return []


def is_simple(value: ast.expr) -> bool:
    """Whether an expression has constants, names and containers only, or is a call over such."""
    parts = [value]
    if isinstance(value, ast.Call):
        parts = [value.func, *value.args, *(each.value for each in value.keywords)]
    return all(isinstance(node, _SIMPLE) for part in parts for node in ast.walk(part))


def _walk_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, `if TYPE_CHECKING` left out."""
    for node in body:
        yield node
        if isinstance(node, ast.Try):
            bodies = (node.body, node.orelse, *(handler.body for handler in node.handlers))
            yield from _walk_statements([*itertools.chain(*bodies)])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from _walk_statements([*node.body, *node.orelse])


@cache
def digest_scan_rules() -> str:
    """What stands for how a text is read: this file, `names_read`, Python's grammar; or nothing."""
    try:
        ours = [inspect.getsource(module) for module in (sys.modules[__name__], names_read)]
    except OSError:  # installed without sources
        return ""
    rules = "\0".join([*ours, *map(str, sys.version_info[:2])])
    return hashlib.sha256(rules.encode()).hexdigest()
