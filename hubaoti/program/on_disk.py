"""What the file of a module says: its functions and classes, and what it names and imports."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from hubaoti.program.model_code import is_outside, module_file, module_text
from hubaoti.program.module_fingerprint import defining_module, list_names_looked_up
from hubaoti.program.names_read import walk_code
from hubaoti.program.source_scan import Import, Parsed, scan_source

CANNOT_TELL: Any = object()


class OnDisk:
    """A module's file; of torch and the standard library only its code is looked at."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.package = module.__name__.partition(".")[0]

    @cached_property
    def codes(self) -> Mapping[str, list[CodeType]]:
        """Functions and bodies of classes by their qualified names.

        Python's own loader reads them, from its cache where that is as new as the file.
        """
        found: dict[str, list[CodeType]] = {}
        for code in walk_code(self.whole) if self.whole is not None else ():
            found.setdefault(code.co_qualname, []).append(code)
        return found

    @cached_property
    def whole(self) -> CodeType | None:
        """The code of the file; None where it cannot be read."""
        loader: Any = getattr(getattr(self.module, "__spec__", None), "loader", None)
        try:
            if hasattr(loader, "get_code"):
                code = loader.get_code(self.module.__name__)
                return code if isinstance(code, CodeType) else None
            file = f"{module_file(self.module)}"
            return compile(self.text or "", file, "exec", dont_inherit=True)
        except (ImportError, OSError, SyntaxError, UnicodeError):  # it was changed since
            return None

    @cached_property
    def text(self) -> str | None:
        """The source; None where the file has none, as a library's."""
        return module_text(self.module)

    @cached_property
    def parsed(self) -> Parsed | None:
        """What is known of the source; nothing of torch's, whose files are many and long."""
        try:
            outside = self.text is None or is_outside(self.package)
            return None if outside else scan_source(self.text)
        except SyntaxError:  # it was changed since
            return None

    @cached_property
    def assigned(self) -> Mapping[str, str]:
        """The expressions of what it names, by qualified names; none of torch's files."""
        return self.parsed.assigned if self.parsed else {}

    @cached_property
    def imports(self) -> Mapping[str, list[tuple[Import, str]]]:
        """The imports of each name that they bind, with what it is called there."""
        found: dict[str, list[tuple[Import, str]]] = {}
        for each in self.parsed.imports if self.parsed else ():
            there = each.originals if each.level is not None else each.names
            here = each.names if each.level is not None else each.originals
            for name, original in zip(here, there, strict=True):
                found.setdefault(name, []).append((each, original))
        return found

    @cached_property
    def homes(self) -> frozenset[str]:
        """The modules that it imports from, and itself."""
        imports = self.parsed.imports if self.parsed else ()
        bases = (each.resolve(self.module.__package__) for each in imports)
        return frozenset([self.module.__name__, *itertools.chain(*bases)])

    def find_imported(self, imported: Import, original: str) -> Any:
        """What a `from` binds, as it is loaded now; CANNOT_TELL where that cannot be told."""
        (base,) = imported.resolve(self.module.__package__)
        inside = sys.modules.get(f"{base}.{original}", CANNOT_TELL)
        try:
            return getattr(sys.modules.get(base), original, inside)
        except Exception:  # of a module that imports as it is asked
            return CANNOT_TELL

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the source; none where there is no source."""
        return (self.text or "").splitlines()

    def decorators(self, code: CodeType) -> frozenset[str]:
        """The packages of the decorators of a function or class; none where it has none."""
        head = itertools.takewhile(_is_head, self.lines[code.co_firstlineno - 1 :])
        names = (found[1] for line in head if (found := re.match(r"\s*@\s*(\w+)", line)))
        values = (vars(self.module).get(name) for name in names)
        return frozenset(package for value in values for package in _list_decorator_packages(value))


class Files:
    """The files of loaded modules, as they are now."""

    def __init__(self) -> None:
        self.known: dict[str, OnDisk | None] = {}

    def of(self, name: str) -> OnDisk | None:
        """The file of a module; None where it has none."""
        if name not in self.known:
            module = sys.modules.get(name)
            file = module_file(module)
            self.known[name] = None
            if module is not None and file is not None:
                self.known[name] = _read_at(module, file.stat().st_mtime_ns)
        return self.known[name]


@lru_cache(512)
def _read_at(module: ModuleType, written: int) -> OnDisk:
    """A module's file as it was written at a time."""
    return OnDisk(module)


def is_class_body(code: CodeType) -> bool:
    """Whether code is the body of a class, which has no variables of its own."""
    return not code.co_flags & inspect.CO_NEWLOCALS


def _is_head(line: str) -> bool:
    """Whether a line stands before the `def` or `class` of what it decorates."""
    return re.match(r"\s*(async |def |class )", line) is None


def _list_decorator_packages(value: Any) -> Iterator[str]:
    """The packages of a decorator, and of what it calls by a global name."""
    named = list_names_looked_up(value.__code__) if isinstance(value, FunctionType) else ()
    for each in (value, *(value.__globals__.get(name) for name in named)):
        where = each.__name__ if isinstance(each, ModuleType) else defining_module(each)
        yield where.partition(".")[0]
