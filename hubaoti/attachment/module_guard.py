"""Whether a module still is what its graphs were bound to; asked at each call, so it is short."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import getitem, is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hubaoti.program.adapters import Adapter, tensor_version
from hubaoti.program.output_capturing import Capture, find_captures, is_capture
from hubaoti.runtime.fallback import CannotServe

# Hooks of every module, which a graph's inner modules would not run (torch.nn.modules.module).
# Attributes of these types are compared, and tuples of such; those of others, as a config, belong
# to many.
_PLAIN = {bool, int, float, str, type(None)}
_PLAIN |= {FunctionType, BuiltinFunctionType, MethodType, partial}
# What is asked otherwise, or put there by us, and what says nothing of a call without gradients.
_ELSEWHERE = {"training", "forward", "_is_hf_initialized", "_valid_auto_compile_criteria"}
_ELSEWHERE |= {"gradient_checkpointing", "_gradient_checkpointing_func"}
_ELSEWHERE |= {"__getstate__", "_replicate_for_data_parallel"}
_NEVER_CALLED = {"extra_repr", "reset_parameters"}  # by a `forward`
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


@dataclass(frozen=True, slots=True)
class FoundConstant:
    """A constant in a module: the dictionary and the name that hold it, and the tensor itself.

    `bound` is what a graph is given: the very tensor, unless it has to be made of it, as it was at
    a version. The dictionary is empty where it is that of the module itself, which it would keep.
    """

    store: dict[str, Any]
    name: str
    tensor: torch.Tensor
    bound: torch.Tensor
    version: int = 0

    @property
    def is_fresh(self) -> bool:
        """Whether the tensor was not written to since something was made of it."""
        return self.bound is self.tensor or self.version == tensor_version(self.tensor)


def list_attributes(part: nn.Module) -> dict[str, Any]:
    """The attributes of a part itself, by which it may compute something else.

    Those that are plain, and what is called in the place of a method of its class.
    """
    return {
        name: each
        for name, each in vars(part).items()
        if name not in _ELSEWHERE and (_is_plain(each) or _is_method(part, name, each))
    }


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _is_method(part: nn.Module, name: str, value: Any) -> bool:
    return callable(value) and callable(getattr(type(part), name, None))


def find_forward(kind: type) -> Mapping[str, Any]:
    """What the class has that a part's `forward` is of, whatever is written into it later."""
    return next(vars(each) for each in kind.__mro__ if "forward" in vars(each))


def list_methods(kind: type) -> dict[str, Any]:
    """A part's `forward`, and what else its class has that it may call."""
    found = find_forward(kind)
    methods = {} if found is vars(nn.Module) else found
    called = {
        name: each
        for name, each in methods.items()
        if isinstance(each, FunctionType) and name[:2] != "__" and name not in _NEVER_CALLED
    }
    return called | {"forward": found["forward"]}


_Traits = tuple[type, dict[str, Any], dict[str, Any]]


def list_traits(parts: Mapping[str, nn.Module]) -> dict[str, _Traits]:
    """What parts compute by, beside their tensors: class, its methods, plain attributes."""
    return {
        path: (type(part), list_methods(type(part)), list_attributes(part))
        for path, part in parts.items()
    }


class ModuleGuard:
    """A module as it was when its graphs were bound.

    Seen are other parts, parameters and buffers, hooks, train mode, a method put on a part or on
    the class that its `forward` is of, attributes that are numbers, texts, functions or tuples of
    them, and adapters that are merged, taken out or heard otherwise. Not seen are other attributes,
    functions of modules, and what is written into a tensor that a graph reads where it lies, which
    needs not be seen.
    """

    def __init__(
        self,
        module: nn.Module,
        found: Sequence[FoundConstant],
        adapters: Sequence[tuple[Adapter, tuple[Any, ...]]],
    ) -> None:
        """`adapters` come with the states in which their layers were looked at."""
        # The module holds its region, which holds this: a way back, or to its own dictionary, would
        # keep a model that nobody has any more, until the garbage collector comes.
        self._module = weakref.ref(module)
        parts = [*module.modules()]
        stores = [
            vars(part)[kind] for part in parts for kind in ("_parameters", "_buffers", "_modules")
        ]
        held = [(store, name, each) for store in stores for name, each in store.items()]
        held += [(vars(part), "training", False) for part in parts[1:]]
        held += [
            (vars(p), name, each) for p in parts[1:] for name, each in list_attributes(p).items()
        ]
        held += [
            (find_forward(kind), name, each)
            for kind in {*map(type, parts)}
            for name, each in list_methods(kind).items()
        ]
        # What is put over a `forward` that is already one of the part's own adds nothing to it.
        own = [vars(part) for part in parts[1:] if "forward" in vars(part)]
        held += [(store, "forward", store["forward"]) for store in own]
        held += [
            (each.store, each.name, each.tensor) for each in found if "_parameters" in each.store
        ]
        self._stores = [store for store, _, _ in held]
        self._names = [name for _, name, _ in held]
        self._things = [each for _, _, each in held]
        self._inner, self._type = parts[1:], type(module)
        self._own = list_attributes(module) | {c.name: c.tensor for c in found if not c.store}
        self._methods = list_methods(type(module)).keys() - {*vars(module), "forward"}
        self._types = [*map(type, self._inner)]
        # What somebody adds: a part to one, or a `forward` of its own to one within.
        self._growing = [*stores[2::3], *map(vars, self._inner)]
        self._sizes = [*map(len, self._growing)]
        hooks: list[dict[int, Any]] = [getattr(torch_module, name) for name in GLOBAL_HOOKS]
        hooks += [part._forward_hooks for part in self._inner]
        hooks += [part._forward_pre_hooks for part in self._inner]
        # transformers' own collect nothing as long as no call asks, and may be there already.
        captured = [each for each in hooks if each and all(map(is_capture, each.values()))]
        self._captured = [(each, [*each]) for each in captured]
        self._captures = find_captures(hook for each in captured for hook in each.values())
        self._hooks = [each for each in hooks if not any(each is other for other in captured)]
        self._tensors = [each.tensor for each in found]
        self._made = [each for each in found if each.bound is not each.tensor]
        self._adapters = [*adapters]

    def is_same(self) -> bool:
        """Whether nothing of it was replaced, hooked, or set to train."""
        module = self._module()
        try:
            return (
                module is not None
                and type(module) is self._type
                and all(map(is_, map(vars(module).get, self._own), self._own.values()))
                and vars(module).keys().isdisjoint(self._methods)
                and not module.training
                and not any(self._hooks)
                and all([*hooks] == known for hooks, known in self._captured)
                and all(map(is_, map(getitem, self._stores, self._names), self._things))
                and [*map(len, self._growing)] == self._sizes
                and [*map(type, self._inner)] == self._types
                and all(each.state() == known for each, known in self._adapters)
                and (not self._made or all(each.is_fresh for each in self._made))
            )
        except KeyError:
            return False

    def refuse_collecting(self) -> None:
        """Refuse a call that collects what only parts of the module have.

        Raises:
            CannotServe: with what it collects.
        """
        if self._captures:
            refuse_collecting(self._captures)

    def wants_gradients(self) -> bool:
        """Whether one of the tensors that were bound is trained."""
        return any(tensor.requires_grad for tensor in self._tensors)


def refuse_collecting(captures: Iterable[Capture]) -> None:
    """Refuse a call that collects what only parts inside of a region have.

    Raises:
        CannotServe: with what it collects.
    """
    keys = sorted(each.key for each in captures if each.is_on)
    if keys:
        raise CannotServe("outputs", f"the call collects {', '.join(keys)} inside of it")
