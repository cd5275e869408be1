"""The code of a model: the files that compute it, their digest, and the names that they read.

Files are known by their names and bytes, so the digest is the same wherever packages lie. What has
no file of its own, a class of a notebook or of the script that runs, is left to `structure`.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType

from torch import nn

from hubaoti.program.names_read import collect_names_in_bytecode
from hubaoti.program.source_scan import Statement, scan_source

# Packages that are no part of a model's own code; torch's version stands in the target.
_OUTSIDE = {"torch", "builtins", "typing", "hubaoti", *sys.stdlib_module_names} - {"__main__"}
_REMOTE = "transformers_modules"  # where transformers puts the code that models bring
# Of large libraries, what computes: the rest loads, saves, generates, and changes by the week.
_COMPUTES = {
    "transformers": re.compile(
        r"models\.(?!auto\b|.*\.(generation|tokenization|processing|image_processing)_).+"
        r"|activations|(masking|pytorch|time_series|vision)_utils|modeling_(layers|rope_utils)"
        r"|integrations\.(moe|sdpa_attention)"
    ),
    "diffusers": re.compile(
        r"models\.(?!auto_model|cache_utils|model_loading|modeling_(utils|outputs)|_modeling).+"
    ),
}
_BY_NAME = ("transformers.integrations.sdpa_attention",)  # chosen by a word, imported by nobody
_ROPE = "transformers.modeling_rope_utils"  # reads `head_dim` by a name that is an argument


@dataclass(frozen=True)
class Code:
    """The classes of a model and its config, and all modules that compute it."""

    classes: frozenset[type]
    configs: frozenset[type]
    modules: tuple[ModuleType, ...]

    @cached_property
    def digest(self) -> str:
        """One sha256 over the classes' names, and over the files' names and bytes."""
        named = {f"{strip_remote_prefix(c.__module__)}.{c.__qualname__}" for c in self.classes}
        found = ((strip_remote_prefix(each.__name__), module_file(each)) for each in self.modules)
        return digest_sources([(name, file) for name, file in found if file], sorted(named))

    @cached_property
    def words(self) -> frozenset[str] | None:
        """What the code reads, attributes and strings; None where it cannot be told."""
        found = set[str]().union(*map(collect_names_in_bytecode, filter(is_loose, self.classes)))
        for module in self.modules:
            text = module_text(module)
            if text is None and module_file(module) is not None:
                return None
            computing, describing = self._separate_statements(module, text or "")
            if module.__name__ != _ROPE and any(each.by_computed_name for each in computing):
                return None
            found.update(*(each.words for each in computing))
            found.update(*(each.methods for each in describing))
            for value in [*vars(module).values()] if text is None else ():
                if getattr(value, "__module__", None) == module.__name__:
                    found |= collect_names_in_bytecode(value)
        return frozenset(found)

    def _separate_statements(
        self, module: ModuleType, text: str
    ) -> tuple[list[Statement], list[Statement]]:
        """The statements of a module that compute, and the classes of the model's config.

        Other models that happen to share the file are left out.
        """
        named = {cls.__qualname__ for cls in self.configs if cls.__module__ == module.__name__}
        computing: list[Statement] = []
        describing: list[Statement] = []
        for each in scan_source(text).statements:
            cls = vars(module).get(each.defines) if each.defines else None
            is_module = isinstance(cls, type) and issubclass(cls, nn.Module)
            if each.defines in named:
                describing.append(each)
            elif cls in self.classes or not (each.has_forward or is_module):
                computing.append(each)
        return computing, describing

    def reads(self, name: str, *aliases: str) -> bool:
        """Whether the code may read an attribute or key by one of these names."""
        return self.words is None or not self.words.isdisjoint({name, *aliases})

    @cached_property
    def left_of_one(self) -> frozenset[str]:
        """The names that the code takes from one, as in `1 - config.dropout`.

        By what a probability leaves some multiply without training, too.
        """
        rest = re.compile(r"\b1(?:\.0)? - (?:\w+\.)*(\w+)\b")
        return frozenset(n for each in self.modules for n in rest.findall(module_text(each) or ""))


def collect_code(
    model: nn.Module, configs: Iterable[type] = (), further: Iterable[str] = ()
) -> Code:
    """The code of a model, of its config's classes, and of modules that are named besides."""
    types = frozenset(type(module) for module in model.modules())
    return collect_code_of_types(types, frozenset(configs), frozenset(further))


@lru_cache(64)
def collect_code_of_types(
    types: frozenset[type], configs: frozenset[type], further: frozenset[str]
) -> Code:
    """The code of classes alone, read once in a process: what is loaded is what computes."""
    bases = {base for cls in types for base in cls.__mro__}
    classes = {
        base
        for base in bases
        if _is_followed(base.__module__) or (is_loose(base) and issubclass(base, nn.Module))
    }
    described = {base for cls in configs for base in cls.__mro__ if _is_followed(base.__module__)}
    start = {cls.__module__ for cls in {*classes, *described}} | further
    if any(name.split(".")[0] in {"transformers", _REMOTE} for name in start):
        start |= {*_BY_NAME}
    modules = [sys.modules[name] for name in sorted(_follow_imports(start)) if name in sys.modules]
    return Code(frozenset(classes), frozenset(described), tuple(modules))


def is_outside(name: str) -> bool:
    """Whether a module is of torch or of the standard library, or ours."""
    return name.partition(".")[0] in _OUTSIDE


def _is_followed(name: str) -> bool:
    """Whether a module belongs to a model's code, by its name.

    Neither torch does, nor what every model of a library inherits: loading, saving, generating.
    """
    package, _, rest = name.partition(".")
    computing = package not in _COMPUTES or _COMPUTES[package].fullmatch(rest)
    return bool(computing) and not is_outside(name)


def _follow_imports(start: Iterable[str]) -> set[str]:
    """Modules by name, and all those whose functions, classes and constants they import.

    Of other packages only those that are not installed: the folder of a project.
    """
    seen: set[str] = set()
    waiting = [name for name in start if _is_followed(name)]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        module = sys.modules.get(name)
        if module is not None and name != "__main__":
            sources = filter(_is_followed, _list_import_sources(module))
            waiting += [each for each in sources if is_near(each, name)]
    return seen


def is_near(name: str, importer: str) -> bool:
    """Whether a module is of the importer's package, or of a folder that is not installed."""
    if name.partition(".")[0] == importer.partition(".")[0]:
        return True
    file = module_file(sys.modules.get(name))
    if file is None or not {"site-packages", "dist-packages"}.isdisjoint(file.parts):
        return False
    return not f"{file}".startswith(sysconfig.get_path("stdlib"))


def _list_import_sources(module: ModuleType) -> Iterator[str]:
    """The names of the modules from which a module imports, where they are defined."""
    for each in scan_source(module_text(module) or "").imports:
        bases = each.resolve(module.__package__)
        yield from bases
        for name in each.names if each.level is not None else ():
            value = vars(module).get(name)
            defined = getattr(value, "__module__", None)
            if isinstance(value, ModuleType):
                yield value.__name__
            if isinstance(defined, str):
                yield defined


def digest_sources(files: Iterable[tuple[str, Path]], names: Iterable[str] = ()) -> str:
    """One sha256 over names, and over files by their modules' names and their bytes."""
    lines = {f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in files}
    return hashlib.sha256("\n".join([*names, *sorted(lines)]).encode()).hexdigest()


def strip_remote_prefix(name: str) -> str:
    """A module's name; of code that a model brings without its folder, a repo and a commit."""
    return name.rpartition(".")[2] if name.startswith(f"{_REMOTE}.") else name


def module_file(module: ModuleType | None) -> Path | None:
    """The file of a module; None for the script that runs, and where there is none."""
    file = getattr(module, "__file__", None)
    if file is None or module is None or module.__name__ == "__main__":
        return None
    return Path(file) if Path(file).is_file() else None


def module_text(module: ModuleType) -> str | None:
    """The source of a module, where it has one."""
    file = module_file(module)
    return None if file is None or file.suffix != ".py" else file.read_text(encoding="utf-8")


def is_loose(cls: type) -> bool:
    """Whether a class is not what its module's file says: made in a function or in a notebook."""
    if is_outside(cls.__module__):
        return is_generated(vars(cls).get("forward"))  # torch.fx writes classes
    return "<locals>" in cls.__qualname__ or module_file(sys.modules.get(cls.__module__)) is None


def is_generated(function: object) -> bool:
    """Whether a function was written by `exec`, so that no file has it."""
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    return file.startswith("<") and not file.startswith("<frozen")
