"""What a module computes where no config says it: its parts, their attributes and their code.

A listing of plain values that is equal for equal modules, in every process; what was trained, the
values of parameters and of buffers that a checkpoint has, is not in it.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.canonical import SAFE
from hubaoti.program.model_code import (
    is_generated,
    is_loose,
    is_near,
    is_outside,
    strip_remote_prefix,
)
from hubaoti.program.names_read import unwrap_descriptor, walk_code
from hubaoti.program.output_capturing import is_capture

OWN = {*vars(nn.Module()), "training"}  # what torch keeps in every module
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_UNUSED: dict[type, set[str]] = {nn.Embedding: {"padding_idx"}, **dict.fromkeys(_DROPOUTS, {"p"})}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_DEEP = 12  # levels of values within values; what lies deeper computes nothing here

Counts = Callable[[str, Any], bool]


class Listing:
    """The values of one module, as canonical JSON can have them.

    `counts` decides by an attribute's name and value; `special` lists a value in its own way, or
    returns NotImplemented. `modules` are the Python modules whose functions were met.
    """

    def __init__(
        self,
        root: nn.Module,
        counts: Counts = lambda name, value: True,
        special: Callable[[Any], Any] = lambda value: NotImplemented,
    ) -> None:
        self.root = root
        self.counts = counts
        self.special = special
        self.modules: set[str] = set()
        self.names = {id(module): f"module {name}" for name, module in root.named_modules()}
        tensors = (*root.named_parameters(), *root.named_buffers())
        self.names |= {id(tensor): f"tensor {name}" for name, tensor in tensors}
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id is given twice

    def parts(self) -> dict[str, Any]:
        """Every module below the root, by its name."""
        return {name: self.part(module) for name, module in self.root.named_modules()}

    def part(self, module: nn.Module) -> dict[str, Any]:
        """One module: its class, tensors, attributes and hooks."""
        left = _UNUSED.get(type(module), set())
        if is_outside(type(module).__module__):
            left = left | {name for name in vars(module) if name.startswith("_")}
        attributes = {k: v for k, v in vars(module).items() if k not in left and self.has(k, v)}
        found = (hook for name in _HOOKS for hook in getattr(module, name).values())
        hooks = [hook for hook in found if not is_ours(hook) and not is_capture(hook)]
        return {
            "class": self.kind(type(module)),
            "tensors": self.tensors(module),
            "attributes": {k: self.value(v) for k, v in attributes.items()},
            "hooks": [self.value(hook) for hook in hooks],
        }

    def has(self, name: str, value: Any) -> bool:
        """Whether an attribute may count: none of torch's and none of ours."""
        return name not in OWN and not is_ours(value) and self.counts(name, value)

    def tensors(self, module: nn.Module) -> dict[str, Any]:
        """Parameters and buffers by shape and dtype; by value, too, where no checkpoint has it."""
        passing = module._non_persistent_buffers_set
        own = (*module._parameters.items(), *module._buffers.items())
        return {
            name: _digest_tensor(item, name in passing) for name, item in own if item is not None
        }

    def value(self, value: Any, depth: int = 0) -> Any:
        """Any value; of an object that was met before, its number."""
        if is_plain(value):
            return convert_plain_value(value)
        if depth > _DEEP or id(value) in self.names:
            return self.names.get(id(value), "…")
        if (own := self.special(value)) is not NotImplemented:
            return own
        if id(value) in self.seen:
            return f"seen {self.seen[id(value)]}"
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        return self.expand(value, depth + 1)

    def expand(self, value: Any, depth: int) -> Any:
        """A value that is made of others."""
        if isinstance(value, torch.Tensor):
            return _digest_tensor(value, True)
        if isinstance(value, Mapping):
            return {f"{key}": self.value(item, depth) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item, depth) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted(f"{self.value(item, depth)}" for item in value)
        if callable(value) and not isinstance(value, nn.Module):
            return self.call(value, depth)
        return self.thing(value, depth)

    def thing(self, value: Any, depth: int) -> Any:
        """An object, by its class and attributes; by its bytes where it is an array."""
        if callable(getattr(value, "tobytes", None)):
            return [f"{type(value).__name__}", hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, nn.Module):
            return self.part(value)
        fields = getattr(value, "__dict__", {})
        return {
            "class": self.kind(type(value)),
            "fields": {k: self.value(v, depth) for k, v in fields.items() if self.has(k, v)},
        }

    def call(self, value: Any, depth: int) -> Any:
        """Something to call: a function by its code, a class by its name."""
        if isinstance(value, type):
            return self.kind(value)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return [self.value(part, depth) for part in parts]
        if isinstance(value, MethodType):
            return [self.value(value.__func__, depth), self.value(value.__self__, depth)]
        if isinstance(value, FunctionType):
            return self.function(value, depth)
        if isinstance(value, BuiltinFunctionType) or not hasattr(value, "__dict__"):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__name__', '')}"
        return self.thing(value, depth)

    def kind(self, cls: type) -> Any:
        """A class by its name; one that no file tells of by its methods, too."""
        self.modules.add(cls.__module__)
        name = f"{strip_remote_prefix(cls.__module__)}.{cls.__qualname__}"
        if id(cls) in self.seen or not is_loose(cls):
            return name
        self.seen[id(cls)] = len(self.seen)
        own = {key: item for key, item in vars(cls).items() if _is_written(key, item)}
        bases = [self.kind(base) for base in cls.__bases__]
        return [name, bases, {k: self.value(unwrap_descriptor(v), 1) for k, v in own.items()}]

    def function(self, value: FunctionType, depth: int) -> Any:
        """A function by its code and by what it closes over; torch's own by its name."""
        where = value.__module__ or ""
        if is_outside(where) and not is_generated(value):
            return f"{where}.{value.__qualname__}"
        self.modules.add(where)
        known = {name: value.__globals__.get(name) for name in list_names_looked_up(value.__code__)}
        return {
            "code": self.code(value.__code__, depth),
            "closure": [self.value(each, depth) for each in list_closure_values(value)],
            "defaults": self.value([value.__defaults__, value.__kwdefaults__], depth),
            "globals": {k: self.describe_global(v, where, depth) for k, v in known.items()},
        }

    def describe_global(self, value: Any, module: str, depth: int) -> Any:
        """What a function of a module finds by a name; what other modules define, by its name."""
        where = value.__name__ if isinstance(value, ModuleType) else defining_module(value)
        if is_plain(value) or where == module:
            return self.value(value, depth)
        if is_near(where, module):
            self.modules.add(where)
        return f"{strip_remote_prefix(where)}.{getattr(value, '__qualname__', '')}"

    def code(self, code: CodeType, depth: int) -> Any:
        """Bytecode, its names and its constants; no lines and no paths."""
        constants = [
            self.code(item, depth) if isinstance(item, CodeType) else self.value(item, depth)
            for item in code.co_consts
        ]
        names = [*code.co_names, *code.co_varnames, *code.co_freevars]
        return [hashlib.sha256(code.co_code).hexdigest(), names, constants]


def _digest_tensor(tensor: torch.Tensor, valued: bool) -> list[Any]:
    """A tensor's shape and dtype, and a digest of its values where they are asked and known."""
    facts = [list(map(str, tensor.shape)), str(tensor.dtype), type(tensor.data).__name__]
    if not valued or tensor.is_meta:
        return facts
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    octets = real.cpu().contiguous().view(-1).view(torch.uint8)
    return [*facts, hashlib.sha256(octets.numpy().tobytes()).hexdigest()]


def is_plain(value: Any) -> bool:
    """A value that is one word or number, or a short row of them."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    words = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
    return value is None or isinstance(value, (*words, torch.layout, torch.memory_format))


def convert_plain_value(value: Any) -> Any:
    """A plain value as canonical JSON can have it; a device is not a matter of the program."""
    if isinstance(value, (list, tuple)):
        return [convert_plain_value(item) for item in value]
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) <= SAFE else str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value.hex() if isinstance(value, bytes) else str(value)


def list_names_looked_up(code: CodeType) -> list[str]:
    """The names that code and the functions within it look up."""
    return [name for each in walk_code(code) for name in each.co_names]


def defining_module(value: Any) -> str:
    """The name of the Python module that defines a value, or its class."""
    return str(getattr(value, "__module__", None) or type(value).__module__)


def is_ours(value: Any) -> bool:
    """Whether a value is what hubaoti put there: the recording of calls, a compiled graph."""
    return defining_module(value).split(".")[0] == "hubaoti"


def _is_written(key: str, value: Any) -> bool:
    """Whether a class's body has this, or Python added it."""
    return key not in {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__"} and (
        not key.startswith("__") or callable(value)
    )


def list_closure_values(function: FunctionType) -> list[Any]:
    """What a function closes over, of that which has a value yet."""
    values: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            values.append(cell.cell_contents)
    return values
