"""Code that was patched in this process: what is loaded, and is not what its file says.

Looked at is what a call of a model can reach by the names that its code reads: methods, functions,
classes, entries of registries, constants. A model is known by its files, so what somebody put in
their place is in its key, or its answers are compared.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from operator import is_
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from hubaoti.program.model_code import Code, is_generated, is_outside
from hubaoti.program.module_fingerprint import defining_module, is_ours
from hubaoti.program.names_read import unwrap_descriptor
from hubaoti.program.on_disk import CANNOT_TELL, Files, OnDisk, is_class_body
from hubaoti.program.reachable_code import FIXED, CodePlace, Reach, find_functions, function_module
from hubaoti.program.source_scan import DEFAULTS, Import, is_simple

_COMPILED = ("torch._dynamo", "torch._compile")  # what torch.compile puts around a function
_LAYERS = {"kernels"}  # of which transformers' decorators make what they put in a function's place
_LEVELS = 4  # of configs and values within a config
_MOST = 32  # kinds of models whose code is kept in mind


def find_patches(model: nn.Module, code: Code) -> dict[str, Any]:
    """What was patched of the code that a model's calls can reach, by its name."""
    types = frozenset(map(type, model.modules()))
    key = (code, types, frozenset(_collect_texts(_list_part_configs(model))))
    known = _LOOKED_AT.get(key)
    if known is None or not known.is_same:
        while len(_LOOKED_AT) >= _MOST:
            _LOOKED_AT.pop(next(iter(_LOOKED_AT)), None)
        known = _LOOKED_AT[key] = _Look(*key)
    return known.found


class _Look:
    """All that is reached, what it was, and what of it was patched."""

    def __init__(self, code: Code, types: frozenset[type], texts: frozenset[str]) -> None:
        files = Files()
        reach = Reach({each.__name__ for each in code.modules}, files)
        for cls in {*types, *code.configs, torch.Tensor}:
            reach.add(cls)
        while reach.ahead:
            reach.follow(reach.ahead.pop())
        judge = _Judge(reach.words | texts, reach.modules, files)
        self.places = [*reach.places]
        self.owners = [*{(each.module, each.cls): each.names for each in self.places}.values()]
        self.found = {f"{p}": p.value for p in self.places if not judge.is_as_filed(p)}
        self.sizes = [*map(len, self.owners)]
        self.values = [*self.walk_values()]

    @property
    def is_same(self) -> bool:
        """Whether everything is what it was, and nothing came to it."""
        now = [*self.walk_values()]
        same = len(now) == len(self.values) and all(map(is_, now, self.values))
        return same and [*map(len, self.owners)] == self.sizes

    def walk_values(self) -> Iterator[Any]:
        """What is loaded now in each place, with its code and entries, always in one order."""
        for place in self.places:
            value = place.value
            yield value
            if isinstance(value, FunctionType):
                yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
            elif isinstance(value, Mapping):
                for entries in (value, *getattr(value, "__dict__", {}).values()):
                    if isinstance(entries, dict):
                        yield from (*dict.keys(entries), *dict.values(entries))


_LOOKED_AT: dict[tuple[Code, frozenset[type], frozenset[str]], _Look] = {}


class _Judge:
    """Whether what is loaded is what a file says.

    `texts` are those by which registries may be asked; of `modules` the whole source is looked at.
    """

    def __init__(self, texts: set[str], modules: set[str], files: Files) -> None:
        self.texts = texts
        self.modules = modules
        self.files = files
        self.known: dict[CodePlace, bool] = {}

    def is_as_filed(self, place: CodePlace) -> bool:
        """Whether it is, in any of the ways in which the file may have come to it."""
        if place not in self.known:
            self.known[place] = True  # of modules that import each other
            self.known[place] = self.is_explained(place)
        return self.known[place]

    def is_explained(self, place: CodePlace) -> bool:
        """Whether what is in a place is what a file says, worked out anew."""
        file, value = self.files.of(place.module), place.value
        if file is None or is_ours(value) or _is_generated_for(place):
            return True
        ways: list[bool] = []
        if codes := file.codes.get(place.qualname):
            ways.append(self.is_defined(file, codes, place, value))
        # Of all modules those values are looked at by whose entries code finds what it calls.
        if place.module in self.modules or (not any(ways) and isinstance(value, Mapping)):
            imports = file.imports.get(place.name, ()) if place.cls is None else ()
            ways += (self.is_imported(file, *each, value) for each in imports)
            if (text := file.assigned.get(place.qualname)) is not None:
                ways.append(self.is_assigned(file, place, text, value))
        return any(ways) if ways else self.is_nearby(file, place, value)

    def is_imported(self, file: OnDisk, imported: Import, original: str, value: Any) -> bool:
        """Whether a value is what an import takes, and as that module's file says."""
        if imported.level is None:  # a module, or the package that it is in
            names = {original, original.partition(".")[0]} & sys.modules.keys()
            return any(sys.modules[name] is value for name in names) if names else value is None
        expected = file.find_imported(imported, original)
        if expected is CANNOT_TELL:  # something else was put there
            plain = not isinstance(value, (BuiltinFunctionType, type))
            return plain and self.is_nearby(file, CodePlace(file.module.__name__, original), value)
        if expected is not value:
            return False
        if isinstance(value, ModuleType):
            return True
        (base,) = imported.resolve(file.module.__package__)
        return is_outside(base) or self.is_as_filed(CodePlace(base, original))

    def is_assigned(self, file: OnDisk, place: CodePlace, text: str, value: Any) -> bool:
        """Whether a value is what an expression says."""
        kind = re.match(r"(?:\w+\.)*(\w+)\(", text)
        if kind and not (isinstance(value, Mapping) and type(value).__name__ == kind[1]):
            return self.is_nearby(file, place, value)
        if not is_simple(ast.parse(text, mode="eval").body):  # what is kept may have been changed
            return False
        try:
            names = vars(sys.modules[place.module])
            expected = eval(text, {**names}, vars(place.cls) if place.cls else None)
        except Exception:  # of names that are there no more
            return True
        if isinstance(value, Enum):
            value = value.value
        return self.alike(expected, value, partial(self.is_nearby, file, place))

    def alike(self, expected: Any, value: Any, may_have: Callable[[Any], bool]) -> bool:
        """Whether two values are one, or plain ones that are equal; of entries, those in use.

        What a file puts into its containers later is what it `may_have`.
        """
        if expected is value:
            return True
        if expected is CANNOT_TELL:
            return may_have(value)
        if type(expected) is not type(value):
            return False
        if isinstance(value, dict):
            keys = dict.keys(expected) | dict.keys(value)
            used = (k for k in keys if not isinstance(k, str) or k in self.texts)
            pairs = [(dict.get(expected, key, CANNOT_TELL), dict.get(value, key)) for key in used]
        elif isinstance(value, (list, tuple)):
            pairs = [*itertools.zip_longest(expected, value, fillvalue=CANNOT_TELL)]
        elif isinstance(value, Mapping):
            pairs = [
                (vars(expected).get(name, CANNOT_TELL), each) for name, each in vars(value).items()
            ]
        else:
            return not isinstance(value, (*FIXED, type, FunctionType)) or expected == value
        return all(self.alike(ours, theirs, may_have) for ours, theirs in pairs)

    def is_defined(self, file: OnDisk, codes: list[CodeType], place: CodePlace, value: Any) -> bool:
        """Whether a value is the function or class of a file, within its decorators if any."""
        if is_class_body(codes[-1]):
            named = (place.module, place.qualname)
            return isinstance(value, type) and (value.__module__, value.__qualname__) == named
        body = file.codes.get(place.cls.__qualname__, []) if place.cls else []
        packages = frozenset[str]().union(*map(file.decorators, [*codes, *body]))
        functions = [*find_functions(value)]
        around = [each for each in functions if each.__code__ not in codes]
        if packages and not functions:  # a decorator made something else of it
            return defining_module(value).partition(".")[0] in packages
        if len(around) == len(functions):  # it is not there
            return False
        if not packages:
            if isinstance(value, FunctionType) and not self.has_defaults(file, place, value):
                return False
            plain = not around or function_module(functions[0]).startswith(_COMPILED)
            return (
                plain and isinstance(unwrap_descriptor(value), FunctionType) and self.all_of(around)
            )
        return self.all_of(around, packages | _LAYERS)

    def has_defaults(self, file: OnDisk, place: CodePlace, function: FunctionType) -> bool:
        """Whether a function's arguments have the defaults of the file."""
        if place.module not in self.modules:
            return True
        given = (function.__defaults__ or (), function.__kwdefaults__ or {})
        texts = (file.assigned.get(f"{place.qualname}{end}") for end in DEFAULTS)
        return all(
            text is None or self.is_assigned(file, place, text, each)
            for text, each in zip(texts, given, strict=True)
        )

    def is_nearby(self, file: OnDisk, place: CodePlace, value: Any) -> bool:
        """Whether what a file makes by calls is made of code that it has a hold of."""
        if place.cls is None and is_outside(place.module) and not _is_like_torch(place.name, value):
            return False
        homes = {base.__module__ for base in place.cls.__mro__} if place.cls else set()
        homes |= file.homes if place.module in self.modules else set()
        return self.all_of(find_functions(value), {file.package} if not homes else (), homes)

    def all_of(
        self,
        functions: Iterable[FunctionType],
        packages: Collection[str] = (),
        modules: Collection[str] = (),
    ) -> bool:
        """Whether all are of torch, the library, or these, and as their files say."""
        return all(
            (is_outside(home) or home in modules or home.partition(".")[0] in packages)
            and self.is_at_home(each)
            for each in functions
            for home in (function_module(each),)
        )

    def is_at_home(self, function: FunctionType) -> bool:
        """Whether a function's code is what the file says that it is from."""
        file = self.files.of(function_module(function))
        code = function.__code__
        return file is not None and code in file.codes.get(code.co_qualname, ())


def _is_like_torch(name: str, value: Any) -> bool:
    """Whether a value may stand in a module of torch by a name: no object of somebody's class, and
    none of torch's own functions that is called otherwise."""
    if not isinstance(value, BuiltinFunctionType):
        return isinstance(value, type) or is_outside(type(value).__module__)
    known = f"_{value.__name__}"
    return known.endswith(f"_{name}") or known.replace("_", "") == name.replace("_", "")


def _is_generated_for(place: CodePlace) -> bool:
    """Whether a method of a class was written for it, as a dataclass's `__init__`."""
    if place.cls is None or not place.name.startswith("__"):
        return False
    homes = {*map(function_module, find_functions(place.value))}
    made = is_dataclass(place.cls) or any(map(is_generated, find_functions(place.value)))
    return made and "__main__" not in homes


def _collect_texts(value: Any, depth: int = 0) -> set[str]:
    """The texts in a config, and in those within it."""
    if isinstance(value, str):
        return {value}
    if depth == _LEVELS:
        return set()
    held = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    inner = value if isinstance(value, (list, tuple)) else held.values()
    return set[str]().union(*(_collect_texts(each, depth + 1) for each in [*inner]))


def _list_part_configs(model: nn.Module) -> list[Any]:
    """The configs that a model's parts hold, each once."""
    found = (vars(part).get("config") for part in model.modules())
    return [*{id(each): each for each in found}.values()]
