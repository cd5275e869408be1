"""A module's `forward` in whose place something else answers: put over it, and taken away again."""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.locks import ForkSafeLock

_STATE = "__getstate__"  # what copies and pickles of an object are made of
_REPLICA = "_replicate_for_data_parallel"  # the copy for another device (torch 2.11 to 2.15)

CountMiss = Callable[[str, CannotServe], None]


class ModuleReference:
    """What belongs to a module and does not keep it alive."""

    __slots__ = ("_module",)

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def is_gone(self) -> bool:
        """Whether nobody has the module any more."""
        return self._module() is None

    @property
    def module(self) -> nn.Module:
        """The module; who calls it holds it.

        Raises:
            ReferenceError: somebody kept its `forward` alone.
        """
        module = self._module()
        if module is None:
            raise ReferenceError("the module whose forward this was is gone; keep the module")
        return module


class _PlainState(ModuleReference):
    """What a copy of a module is made of: all of it, but what answers in its place.

    A shallow copy would have that of the original, whose weights and hooks are others.
    """

    __slots__ = ()

    def __call__(self) -> Any:
        kind: Any = type(self.module)
        state = kind.__getstate__(self.module)
        return _list_plain(state) if isinstance(state, dict) else state


class _PlainReplica(ModuleReference):
    """The copy of a module that nn.DataParallel gives the weights of a device, which is plain."""

    __slots__ = ()

    def __call__(self) -> nn.Module:
        kind: Any = type(self.module)
        if (patch := find_patch(self.module)) is not None:
            patch.count_miss(
                CannotServe(
                    "device",
                    "copies of nn.DataParallel answer",
                    advice="give each device a process and a model of its own",
                )
            )
        replica: nn.Module = getattr(kind, _REPLICA)(self.module)
        replica.__dict__ = _list_plain(vars(replica))
        return replica


def _list_plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A module's attributes without ours, and with the `forward` that it had of its own."""
    ours = (_PlainState, _PlainReplica)
    plain = {name: each for name, each in attributes.items() if not isinstance(each, ours)}
    own = plain.pop("forward", None)
    while isinstance(own, ForwardPatch):
        own = own.own
    return plain if own is None else {**plain, "forward": own}


class ForwardPatch(ModuleReference, ABC):
    """What answers in the place of a module's `forward`.

    It is an attribute of the module and of nothing else: whoever copies, pickles, compiles or
    exports the module gets the module as it was. It has no `__dict__`, which
    `functools.update_wrapper` would copy to a wrapper.
    """

    __slots__ = ("path", "is_removed", "_own", "_count_miss", "_note_tracing", "__weakref__")

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(module)
        self.path = path
        self.is_removed = False
        self._own = vars(module).get("forward")
        # Nobody is told before it is installed.
        self._count_miss: CountMiss = lambda path, error: None
        self._note_tracing: Callable[[], None] = lambda: None

    def install(self, over: Any = None) -> None:
        """Answer from here on, below what somebody put over us."""
        self.module.forward = over or self
        vars(self.module).update(
            {_STATE: _PlainState(self.module), _REPLICA: _PlainReplica(self.module)}
        )
        _PATCHES[self.module] = weakref.ref(self)

    def remove(self) -> None:
        """Give the module its own `forward` back.

        Where somebody else has put theirs over it meanwhile, it stays, and only calls the module's.
        """
        self.is_removed = True
        if self.is_gone:
            return
        if vars(self.module).get("forward") is self:
            self.lift()
        elif find_patch(self.module) is self:
            self._forget()

    def lift(self) -> None:
        """Have the module's own `forward` lie bare, whatever somebody put over us."""
        vars(self.module).pop("forward", None)
        if self._own is not None:
            self.module.forward = self._own
        if find_patch(self.module) is self:
            self._forget()

    def _forget(self) -> None:
        """Have nobody find it by its module any more."""
        for name in (_STATE, _REPLICA):
            vars(self.module).pop(name, None)
        del _PATCHES[self.module]

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself answers to a call, by the `forward` that it had."""
        if self._own is not None:
            return self._own(*args, **kwargs)
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    def count_miss(self, error: CannotServe) -> None:
        """Tell of a call that is not answered here."""
        self._count_miss(self.path, error)

    @property
    def own(self) -> Any:
        """The `forward` that lies below, where the module had one of its own."""
        return self._own

    @abstractmethod
    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What is answered in the module's place.

        Raises:
            CannotServe: nothing is, with the reason; the module answers itself.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self._note_tracing()
        elif not self.is_removed:
            try:
                return self.answer(args, kwargs)
            except CannotServe as error:
                self.count_miss(error)
        return self.eager(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own `forward`: callers look up there what a model takes."""
        self._require_living()
        return inspect.signature(self._own or partial(type(self.module).forward, self.module))

    @property
    def __code__(self) -> Any:
        """That of the module's own `forward`: `torch.export` looks up there what it exports."""
        self._require_living()
        return (self._own or type(self.module).forward).__code__

    def _require_living(self) -> None:
        if self.is_gone:
            raise AttributeError("the module is gone")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as the module's own `forward`."""
        if self._own is not None:
            return copy.copy, (self._own,)
        return getattr, (self.module, "forward")


class GraphPatch(ForwardPatch):
    """A `forward` that graphs answer, which are bound to the module's tensors."""

    __slots__ = ("graphs", "_counts", "_compared", "_lock")

    def __init__(
        self, path: str, module: nn.Module, graphs: Sequence[Any], ids: Iterable[str]
    ) -> None:
        super().__init__(path, module)
        self.graphs: list[Any] = [*graphs]
        self._counts = {name: itertools.count() for name in ids}
        self._compared = {name: itertools.count() for name in self._counts}
        self._lock = ForkSafeLock()

    def counts(self) -> dict[str, int]:
        """How many calls each graph answered, by the ids of the graphs."""
        return _read_counts(self._counts)

    def compared(self) -> dict[str, int]:
        """How many calls the module answered beside each graph, to compare them."""
        return _read_counts(self._compared)

    @abstractmethod
    def bind(self, *, anew: bool = False) -> None:
        """Give the graphs the module's tensors as they are now; what is made of them, if need be.

        Raises:
            CannotServe: the module is not what it was, or a tensor does not fit.
        """


def _read_counts(counts: Mapping[str, itertools.count[int]]) -> dict[str, int]:
    # `count(7)`: counting by `next` is safe in threads, and so one asks without counting.
    return {name: int(repr(count)[6:-1]) for name, count in counts.items()}


# Whatever somebody puts over a patch, it is known here by its module.
# Neither lives for it: a patch is its module's.
_PATCHES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def find_patch(module: nn.Module) -> Any:
    """The patch of a module itself; None where it has none."""
    return _PATCHES[module]() if module in _PATCHES else None
