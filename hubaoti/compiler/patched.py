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

from hubaoti.compiler.modelcode import Code, is_generated
from hubaoti.compiler.on_disk import UNKNOWN, Files, OnDisk, is_class_body
from hubaoti.compiler.parsed import DEFAULTS, Import, is_simple
from hubaoti.compiler.reached import FIXED, Place, Reach, functions_in, home_of, is_outside
from hubaoti.compiler.structure import is_ours, origin
from hubaoti.compiler.words import bare

COMPILED = ("torch._dynamo", "torch._compile")  # what torch.compile puts around a function
LEVELS = 4  # of configs and values within a config
MOST = 32  # kinds of models whose code is kept in mind


def patches(model: nn.Module, code: Code) -> dict[str, Any]:
    """What was patched of the code that a model's calls can reach, by its name."""
    types = frozenset(map(type, model.modules()))
    asked = (code, types, frozenset(texts_of(configs_of(model))))
    known = LOOKED_AT.get(asked)
    if known is None or not known.is_same:
        while len(LOOKED_AT) >= MOST:
            LOOKED_AT.pop(next(iter(LOOKED_AT)), None)
        known = LOOKED_AT[asked] = Look(*asked)
    return known.found


class Look:
    """All that is reached, what it was, and what of it was patched."""

    def __init__(self, code: Code, types: frozenset[type], texts: frozenset[str]) -> None:
        files = Files()
        reach = Reach({each.__name__ for each in code.modules}, files)
        for cls in {*types, *code.configs, torch.Tensor}:
            reach.add(cls)
        reach.follow_all()
        judge = Judge(reach.words | texts, reach.modules, files)
        self.places = [*reach.places]
        self.owners = [*{(each.module, each.cls): each.names for each in self.places}.values()]
        self.found = {f"{p}": p.value for p in self.places if not judge.is_as_filed(p)}
        self.sizes = [*map(len, self.owners)]
        self.values = [*self.seen()]

    @property
    def is_same(self) -> bool:
        """Whether everything is what it was, and nothing came to it."""
        now = [*self.seen()]
        same = len(now) == len(self.values) and all(map(is_, now, self.values))
        return same and [*map(len, self.owners)] == self.sizes

    def seen(self) -> Iterator[Any]:
        """What is loaded now."""
        for place in self.places:
            value = place.value
            yield value
            if isinstance(value, FunctionType):
                yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
            elif isinstance(value, Mapping):
                for entries in (value, *getattr(value, "__dict__", {}).values()):
                    if isinstance(entries, dict):
                        yield from (*dict.keys(entries), *dict.values(entries))


LAYERS = {"kernels"}  # of which transformers' decorators make what they put in a function's place
LOOKED_AT: dict[tuple[Code, frozenset[type], frozenset[str]], Look] = {}


class Judge:
    """Whether what is loaded is what a file says.

    `texts` are those by which registries may be asked; of `modules` the whole source is looked at.
    """

    def __init__(self, texts: set[str], modules: set[str], files: Files) -> None:
        self.texts = texts
        self.modules = modules
        self.files = files
        self.known: dict[Place, bool] = {}

    def is_as_filed(self, place: Place) -> bool:
        """Whether it is, in any of the ways in which the file may have come to it."""
        if place not in self.known:
            self.known[place] = True  # of modules that import each other
            self.known[place] = self.is_explained(place)
        return self.known[place]

    def is_explained(self, place: Place) -> bool:
        """The same, worked out."""
        file, value = self.files.of(place.module), place.value
        if file is None or is_ours(value) or is_generated_for(place):
            return True
        ways: list[bool] = []
        if codes := file.codes.get(place.qualname):
            ways.append(self.is_defined(file, codes, place, value))
        if place.module in self.modules or (not any(ways) and is_registry(value)):
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
        expected = file.taken(imported, original)
        if expected is UNKNOWN:  # something else was put there
            plain = not isinstance(value, (BuiltinFunctionType, type))
            return plain and self.is_nearby(file, Place(file.module.__name__, original), value)
        if expected is not value:
            return False
        if isinstance(value, ModuleType):
            return True
        (base,) = file.bases(imported)
        return is_outside(base) or self.is_as_filed(Place(base, original))

    def is_assigned(self, file: OnDisk, place: Place, text: str, value: Any) -> bool:
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
        if expected is UNKNOWN:
            return may_have(value)
        if type(expected) is not type(value):
            return False
        if isinstance(value, dict):
            keys = dict.keys(expected) | dict.keys(value)
            used = (k for k in keys if not isinstance(k, str) or k in self.texts)
            pairs = [(dict.get(expected, key, UNKNOWN), dict.get(value, key)) for key in used]
        elif isinstance(value, (list, tuple)):
            pairs = [*itertools.zip_longest(expected, value, fillvalue=UNKNOWN)]
        elif isinstance(value, Mapping):
            pairs = [
                (vars(expected).get(name, UNKNOWN), each) for name, each in vars(value).items()
            ]
        else:
            return not isinstance(value, (*FIXED, type, FunctionType)) or expected == value
        return all(self.alike(ours, theirs, may_have) for ours, theirs in pairs)

    def is_defined(self, file: OnDisk, codes: list[CodeType], place: Place, value: Any) -> bool:
        """Whether a value is the function or class of a file, within its decorators if any."""
        if is_class_body(codes[-1]):
            named = (place.module, place.qualname)
            return isinstance(value, type) and (value.__module__, value.__qualname__) == named
        body = file.codes.get(place.cls.__qualname__, []) if place.cls else []
        packages = frozenset[str]().union(*map(file.decorators, [*codes, *body]))
        functions = [*functions_in(value)]
        around = [each for each in functions if each.__code__ not in codes]
        if packages and not functions:  # a decorator made something else of it
            return origin(value).partition(".")[0] in packages
        if len(around) == len(functions):  # it is not there
            return False
        if not packages:
            if isinstance(value, FunctionType) and not self.has_defaults(file, place, value):
                return False
            plain = not around or home_of(functions[0]).startswith(COMPILED)
            return plain and isinstance(bare(value), FunctionType) and self.all_of(around)
        return self.all_of(around, packages | LAYERS)

    def has_defaults(self, file: OnDisk, place: Place, function: FunctionType) -> bool:
        """Whether a function's arguments have the defaults of the file."""
        if place.module not in self.modules:
            return True
        given = (function.__defaults__ or (), function.__kwdefaults__ or {})
        texts = (file.assigned.get(f"{place.qualname}{end}") for end in DEFAULTS)
        return all(
            text is None or self.is_assigned(file, place, text, each)
            for text, each in zip(texts, given, strict=True)
        )

    def is_nearby(self, file: OnDisk, place: Place, value: Any) -> bool:
        """Whether what a file makes by calls is made of code that it has a hold of."""
        if place.cls is None and is_outside(place.module) and not is_like_torch(place.name, value):
            return False
        homes = {base.__module__ for base in place.cls.__mro__} if place.cls else set()
        homes |= file.homes if place.module in self.modules else set()
        return self.all_of(functions_in(value), {file.package} if not homes else (), homes)

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
            for home in (home_of(each),)
        )

    def is_at_home(self, function: FunctionType) -> bool:
        """Whether a function's code is what the file says that it is from."""
        file = self.files.of(home_of(function))
        code = function.__code__
        return file is not None and code in file.codes.get(code.co_qualname, ())


def is_registry(value: Any) -> bool:
    """Whether a value has entries by which code finds what it calls."""
    return isinstance(value, Mapping)


def is_like_torch(name: str, value: Any) -> bool:
    """Whether a value may stand in a module of torch by a name: no object of somebody's class, and
    none of torch's own functions that is called otherwise."""
    if not isinstance(value, BuiltinFunctionType):
        return isinstance(value, type) or is_outside(type(value).__module__)
    known = f"_{value.__name__}"
    return known.endswith(f"_{name}") or known.replace("_", "") == name.replace("_", "")


def is_generated_for(place: Place) -> bool:
    """Whether a method of a class was written for it, as a dataclass's `__init__`."""
    if place.cls is None or not place.name.startswith("__"):
        return False
    homes = {*map(home_of, functions_in(place.value))}
    made = is_dataclass(place.cls) or any(map(is_generated, functions_in(place.value)))
    return made and "__main__" not in homes


def texts_of(value: Any, depth: int = 0) -> set[str]:
    """The texts in a config, and in those within it."""
    if isinstance(value, str):
        return {value}
    if depth == LEVELS:
        return set()
    held = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    inner = value if isinstance(value, (list, tuple)) else held.values()
    return set[str]().union(*(texts_of(each, depth + 1) for each in [*inner]))


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that a model's parts hold, each once."""
    found = (vars(part).get("config") for part in model.modules())
    return [*{id(each): each for each in found}.values()]
