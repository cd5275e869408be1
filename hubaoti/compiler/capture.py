"""Calls: what a module was given, as a template of literals and a flat list of tensors.

A template is JSON: `{"tensor": 0}` stands for the first tensor, `{"size": "seq"}` for a number that
follows a dim, `{"cache": true}` for the KV cache, `{"any": ...}` for a tensor or a flag that is not
computed with, so a caller may give anything; tuples, dtypes and devices have such words, too. A
mapping that is no plain dictionary has its class beside its fields, one whose keys are in no
alphabetic order has that order, since JSON keeps none; one with whole numbers for keys is a list of
its items. What a module leaves in its call may be what the call gives: `{"given": path}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from hubaoti.artifact.sizes import format_count
from hubaoti.compiler.patched import shadow_attribute
from hubaoti.errors import BadRequest, first_line
from hubaoti.runtime.call_template import split_word

_PLAIN_KINDS = (bool, int, float, str, type(None))


class Opaque(Exception):
    """A value that no template can hold."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its template, its tensors in order, and a name for each."""

    template: dict[str, Any]
    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    caches: tuple[Any, ...] = ()

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each tensor, in the order of `tensors`."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    def without_device(self) -> Call:
        """The call with what is asked of its tensors: numbers and masks are brought from a GPU, of
        others the kind is enough. Each is brought once, since a device is waited for."""
        named = zip(self.names, self.tensors, strict=True)
        return replace(self, tensors=tuple(_bring_to_cpu(name, tensor) for name, tensor in named))


def _bring_to_cpu(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU itself, and of another device as much of it as is asked for."""
    if tensor.device.type in {"cpu", "meta"}:
        return tensor
    real = tensor.is_floating_point() or tensor.is_complex()
    return tensor.to("meta" if real and "mask" not in name else "cpu")


@dataclass(slots=True)
class Frozen:
    """Tensors and caches met while a value is made a template."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    given: Mapping[int, Sequence[Any]] = field(default_factory=dict)  # paths in a call, by id

    def freeze(self, value: Any, name: str) -> Any:
        """The template of a value.

        Raises:
            Opaque: there is none.
        """
        if id(value) in self.given:
            return {"given": [*self.given[id(value)]]}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._index_tensor(value, name)}
        if isinstance(value, _PLAIN_KINDS):
            whole = type(value) is float and not value % 1.0  # JSON would make an int of it
            return {"float": repr(value)} if whole else value
        if isinstance(value, (torch.dtype, torch.device)):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if isinstance(value, Cache):
            self.caches.append(value)
            return {"cache": True}
        if isinstance(value, Mapping):
            return self._freeze_mapping(value, name)
        if isinstance(value, (tuple, list)):
            items = [self.freeze(item, f"{name}_{index}") for index, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        raise Opaque(f"{name} is a {_class_name(value)}")

    def _freeze_mapping(self, value: Mapping[Any, Any], name: str) -> dict[str, Any]:
        if not all(type(key) in {str, int} for key in value):
            raise Opaque(f"{name} has keys that are neither words nor whole numbers")
        pairs = [[key, self.freeze(item, f"{name}_{key}")] for key, item in value.items()]
        if not all(isinstance(key, str) for key in value):
            return {"items": pairs}
        items = {key: frozen for key, frozen in pairs}
        if hasattr(value, "__dataclass_fields__"):  # an output of transformers or diffusers
            return {"fields": items, "class": _class_name(value)}
        in_order = [*items] == sorted(items)
        return {"dict": items} | ({} if in_order else {"order": [*items]})

    def _index_tensor(self, tensor: torch.Tensor, name: str) -> int:
        """A tensor that is given twice has one place, so that the graph has one input for it."""
        seen = [*map(id, self.tensors)]
        if id(tensor) in seen:
            return seen.index(id(tensor))
        self.tensors.append(tensor)
        self.names.append(name)
        return len(seen)


def thaw(template: Any, tensors: Sequence[torch.Tensor], known: Mapping[str, Any]) -> Any:
    """The value of a template; `known` has the sizes of dims, and the cache."""
    if isinstance(template, list):
        return [thaw(item, tensors, known) for item in template]
    if not isinstance(template, dict):
        return template
    word, inner = split_word(template)
    if word == "tensor":
        return tensors[inner]
    if word == "tuple":
        return tuple(thaw(item, tensors, known) for item in inner)
    if word in {"dict", "fields"}:  # a graph takes plain dictionaries
        return {key: thaw(item, tensors, known) for key, item in inner.items()}
    if word == "items":
        return {key: thaw(item, tensors, known) for key, item in inner}
    return _CONSTANTS[word](inner, known)


def thaw_arguments(
    template: Mapping[str, Any], tensors: Sequence[torch.Tensor], known: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the keyword arguments of a call's template."""
    args = [thaw(item, tensors, known) for item in template["args"]]
    return args, {name: thaw(item, tensors, known) for name, item in template["kwargs"].items()}


_CONSTANTS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "size": lambda extent, known: known["size"](extent),
    "cache": lambda _, known: known["cache"],
    "any": lambda face, known: _make_dummy_tensor(face, known) if isinstance(face, dict) else face,
    "dtype": lambda name, _: getattr(torch, name),
    "device": lambda name, known: _find_device(torch.device(name), known.get("device")),
    "float": lambda text, _: float(text),
}


def _find_device(named: torch.device, tensors: Any) -> torch.device:
    """The device that a call names; a GPU is where its tensors are, as when it is traced."""
    there = named if tensors is None else torch.device(tensors)
    return there if named.type == "cuda" else named


def _make_dummy_tensor(face: Mapping[str, Any], known: Mapping[str, Any]) -> torch.Tensor:
    """A tensor that stands where any could stand."""
    shape = [known["size"](size) if isinstance(size, str) else size for size in face["shape"]]
    return torch.zeros(shape, dtype=getattr(torch, face["dtype"]), device=known["device"])


def _class_name(value: Any) -> str:
    """The full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def make_call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call as its template; positional arguments are named as `forward` calls them.

    Raises:
        Opaque: it was given something that no template can hold.
    """
    frozen, names = Frozen(), _name_positionals(forward, len(args))
    template = {
        "args": [frozen.freeze(arg, name) for arg, name in zip(args, names, strict=False)],
        "kwargs": {name: frozen.freeze(kwargs[name], name) for name in kwargs},
    }
    return Call(template, tuple(frozen.tensors), tuple(frozen.names), tuple(frozen.caches))


def _name_positionals(forward: Callable[..., Any], count: int) -> list[str]:
    """The names of so many positional arguments; what `forward` has none for is numbered."""
    named = [
        p.name
        for p in inspect.signature(forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return [*named, *(f"input_{index}" for index in range(len(named), count))]


def bind_arguments(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names that `forward` has for them."""
    return {**dict(zip(_name_positionals(forward, len(args)), args, strict=False)), **kwargs}


class _Enough(BaseException):
    """Leaves the block of `record_calls`: the calls that were asked for have come."""


@dataclass(slots=True)
class Calls:
    """The calls that a module received: one of each structure and sizes, in order."""

    module: nn.Module
    limit: int | None = None
    run: bool = True
    came: int = 0
    each: list[Call] = field(default_factory=list)
    problem: str | None = None

    def __repr__(self) -> str:
        kept = f"{format_count(self.came, 'call')} of {type(self.module).__name__}"
        return f"Calls({kept}, {len(self.each)} kept)"

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Call]:
        return iter(self.each)

    def add(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep a call; its tensors are copied, since the module may write into them."""
        try:
            call = make_call(forward, args, kwargs)
        except Opaque as error:
            self.problem = self.problem or str(error)
            return
        if all(call.template != old.template or call.sizes != old.sizes for old in self.each):
            copies = tuple(tensor.detach().clone() for tensor in call.tensors)
            self.each.append(Call(call.template, copies, call.names, call.caches))

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, of which each call is kept; `_Enough` ends the last one where none is run."""

        def record_and_call(*args: Any, **kwargs: Any) -> Any:
            self.came += 1
            if self.limit is None or self.came <= self.limit:
                self.add(forward, args, kwargs)
            if self.run:
                return forward(*args, **kwargs)
            if self.came == self.limit:
                raise _Enough
            return None

        return record_and_call

    def require(self) -> list[Call]:
        """The calls, of which there is one at least.

        Raises:
            BadRequest: none came, or they could not be recorded.
        """
        if self.each:
            return self.each
        kind = type(self.module).__name__
        if self.problem:
            raise BadRequest(
                f"capture: a call of {kind} cannot be recorded: {self.problem}",
                hint="capture a module inside that takes tensors and plain values",
            )
        raise BadRequest(
            f"capture: {kind} was never called",
            hint="call the pipeline inside `with hubaoti.capture(module) as calls:`",
        )


@contextmanager
def record_calls(module: nn.Module, n: int | None = None, *, run: bool = True) -> Iterator[Calls]:
    """Record the calls that `module` receives inside the block, whoever makes them.

    All of them, or the first `n`. With `run=False` the module is not run, its calls answer None,
    and the block is left, without an error, as soon as `n` of them (one, by default) have come.
    Direct calls of `module.forward` are seen, too. Tensors are copied.

    Raises:
        BadRequest: `n` is less than one; what called the module cannot go on without its answer.
    """
    if n is not None and n < 1:
        raise BadRequest(f"capture was asked for {n} calls", hint="ask for one or more")
    calls = Calls(module, n or (None if run else 1), run)
    with replace_forward(module, calls.wrap(module.forward)):
        try:
            yield calls
        except _Enough:
            pass
        except Exception as error:
            if run or not calls.came:
                raise
            raise BadRequest(
                f"capture: the caller needed the answer of call {calls.came}: {first_line(error)}",
                hint="leave `run=False` out, or ask for one call",
            ) from error


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Give one module, and no other of its class, another `forward` for a while."""
    return shadow_attribute(module, "forward", forward)
