"""What a call of a model can reach: each place where code finds a function, a class or a value.

Over all names that code which is reached reads, so it is rather too much than too little.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from hubaoti.program.model_code import is_outside, strip_remote_prefix
from hubaoti.program.module_fingerprint import is_ours, list_closure_values
from hubaoti.program.names_read import UNTRAINED, collect_names_in_bytecode
from hubaoti.program.on_disk import Files

_FURTHER = {"transformers.cache_utils"}  # what model code calls beside its own
_TORCH = ("torch.nn.modules", "torch.nn.functional")
_DEEP = 4  # modules within modules, as in torch.nn.functional
# What calls a function in its own way, and the attributes in which it has it.
_CALLED = (
    FunctionType, MethodType, partial, property, classmethod, staticmethod, cached_property,
)  # fmt: skip
_INSIDE = ("fget", "fset", "fdel", "__func__", "func")
# What a wrapper is made of, as `functools.wraps` says it; and what torch.jit.script, custom ops and
# triton (3.6) name otherwise, of whose objects nothing else tells where they are from.
_ORIGINALS = {"__wrapped__", "_torchdynamo_inline", "_init_fn", "fn"}
FIXED = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


@dataclass(frozen=True)
class CodePlace:
    """A name in a module, or in a class of it."""

    module: str
    name: str
    cls: type | None = None

    @property
    def qualname(self) -> str:
        """The qualified name within the module, as its file's code has it."""
        return f"{self.cls.__qualname__}.{self.name}" if self.cls else self.name

    @property
    def value(self) -> Any:
        """What is loaded under the name now; None where nothing is."""
        return self.names.get(self.name)

    @property
    def names(self) -> Mapping[str, Any]:
        """The names of the class or module that has it."""
        return getattr(self.cls or sys.modules.get(self.module), "__dict__", {})

    def __str__(self) -> str:
        return f"{strip_remote_prefix(self.module)}.{self.qualname}"


class Reach:
    """Everything that calls can reach: a method counts where some code that is reached names it."""

    def __init__(self, modules: Iterable[str], files: Files) -> None:
        self.files = files
        self.modules = {*modules, *_FURTHER}
        self.places: dict[CodePlace, None] = {}
        self.words: set[str] = set()  # names and texts of the code that was reached
        self.seen: set[int] = set()
        self.waiting: dict[str, list[type]] = {}  # classes, by members that nobody named yet
        self.ahead: list[Any] = []

    def add(self, cls: type) -> None:
        """A class of which there may be instances, and its bases."""
        for base in cls.__mro__:
            if id(base) in self.seen or _is_standard(base.__module__):
                continue
            self.seen.add(id(base))
            for name in [*vars(base)]:
                if name in self.words or name.startswith("__") or issubclass(base, Mapping):
                    self.reach(base, name)
                else:
                    self.waiting.setdefault(name, []).append(base)

    def reach(self, cls: type, name: str) -> None:
        """Note a member of a class as reached, and have it followed."""
        if name in UNTRAINED:
            return
        if self.files.of(cls.__module__) and "<locals>" not in cls.__qualname__:
            self.places[CodePlace(cls.__module__, name, cls)] = None
        self.ahead.append(vars(cls)[name])

    def follow(self, value: Any) -> None:
        """Whatever can be called by a value."""
        if isinstance(value, type) and not is_outside(value.__module__):
            self.add(value)
        if isinstance(value, FIXED) or id(value) in self.seen or is_ours(value):
            return
        self.seen.add(id(value))
        for function in find_functions(value):
            self.enter(function)
        if isinstance(value, Mapping):
            self.add(type(value))
        if isinstance(value, dict):
            self.ahead += dict.values(value)  # some make a thing of an entry that is read
        elif isinstance(value, (list, tuple)):
            self.ahead += value

    def enter(self, function: FunctionType) -> None:
        """Look up the names that a function reads, if its module's functions are followed."""
        module = sys.modules.get(function.__globals__.get("__name__", ""))
        if module is None or vars(module) is not function.__globals__ or not self.holds(module):
            return
        words = collect_names_in_bytecode(function)
        new = words - self.words
        self.words |= words
        for word in new:
            for cls in self.waiting.pop(word, ()):
                self.reach(cls, word)
        self.look(module, words)

    def holds(self, module: ModuleType) -> bool:
        """Whether functions of a module are followed."""
        name = module.__name__
        return name in self.modules or name.startswith(_TORCH) or not self.files.of(name)

    def look(self, module: ModuleType, words: set[str], depth: int = 0) -> None:
        """What names are in a module; of modules within it, those of the same words."""
        for name in [word for word in words if word in vars(module)]:
            value = vars(module)[name]
            self.places[CodePlace(module.__name__, name)] = None
            self.ahead.append(value)
            inside = isinstance(value, ModuleType) and sys.modules.get(value.__name__) is value
            if depth < _DEEP and inside and not _is_standard(value.__name__):
                self.look(value, words, depth + 1)


def find_functions(value: Any, seen: set[int] | None = None) -> Iterator[FunctionType]:
    """The functions that a value calls: itself, what it is wrapped around, what it closes over."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        yield value
    for each in _walk_wrapped(value):
        yield from find_functions(each, seen)


def _walk_wrapped(value: Any) -> Iterator[Any]:
    """What a function, a method, or what a decorator made of one calls."""
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, FunctionType):
        yield from (each for each in list_closure_values(value) if isinstance(each, _CALLED))
    elif isinstance(value, _CALLED):
        yield from filter(None, (getattr(value, name, None) for name in _INSIDE))
    elif "<locals>" in type(value).__qualname__:  # an object of a class for this one function
        yield from vars(type(value)).values()
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and not isinstance(value, ModuleType):
        yield from (own[name] for name in _ORIGINALS & own.keys())


def function_module(function: FunctionType) -> str:
    """The module whose names a function reads, whatever it says itself."""
    return str(function.__globals__.get("__name__", ""))


def _is_standard(name: str) -> bool:
    """Whether a module is of the standard library, or ours."""
    return is_outside(name) and not name.startswith("torch")
