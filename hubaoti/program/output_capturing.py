"""transformers' own capture hooks: which hooks they are, and what a call collects by them.

transformers leaves them on the parts of a model from the first call on that asks for hidden states,
attentions or router logits; in any other call they do nothing, so that they need not end serving.

Private, checked on transformers 5.15 to 5.24: `utils/output_capturing.py`, whose hooks close over
the `key` that they collect and ask `_active_collector`; transformers is not imported. A hook that
is made otherwise is taken for somebody's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

from hubaoti.program.names_read import walk_code

_HOOK = ("transformers.utils.output_capturing", "output_capturing_hook")
# What a model is asked for beside its answer; it hands the words on to all that its blocks call.
FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass(frozen=True, slots=True)
class Capture:
    """What hooks of one key collect, while a call has a collector for it."""

    key: str
    collector: Any

    @property
    def is_on(self) -> bool:
        """Whether the call that runs collects by it."""
        collected = self.collector.get()
        return collected is not None and self.key in collected


def _read_capture(hook: Any) -> Capture | None:
    """What a hook of transformers' collects; None of any other hook."""
    if not isinstance(hook, FunctionType) or (hook.__module__, hook.__name__) != _HOOK:
        return None
    cells = zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)
    key = next((cell.cell_contents for name, cell in cells if name == "key"), None)
    collector = hook.__globals__.get("_active_collector")
    return None if key is None or collector is None else Capture(key, collector)


def is_capture(hook: Any) -> bool:
    """Whether transformers put a hook there, to collect what a call may ask for."""
    return _read_capture(hook) is not None


def find_captures(hooks: Iterable[Any]) -> set[Capture]:
    """What those of transformers among these hooks collect, each once."""
    return {each for each in map(_read_capture, hooks) if each is not None}


def find_captures_inside(module: nn.Module) -> set[Capture]:
    """What is collected inside of a module; its own hooks run around its graph."""
    parts = [part for part in module.modules() if part is not module]
    return find_captures(hook for part in parts for hook in part._forward_hooks.values())


def find_unread_flags(block: nn.Module) -> frozenset[str]:
    """The flags that change nothing of what a block answers, whoever hands them on to it.

    No part of it takes them by name or looks them up, and none is a model, which answers to them.
    """
    if any(hasattr(part, "_can_record_outputs") for part in block.modules()):
        return frozenset()
    classes = {type(part) for part in block.modules()}
    bases = {base for cls in classes for base in cls.__mro__} - {nn.Module, object}
    return frozenset(FLAGS).difference(*map(_list_words_taken, bases))


def _list_words_taken(cls: type) -> Iterator[str]:
    """The names of what the functions of a class take, and the words in them."""
    for function in filter(callable, vars(cls).values()):
        if code := getattr(inspect.unwrap(function), "__code__", None):
            for each in walk_code(code):
                yield from each.co_varnames
                yield from (item for item in each.co_consts if isinstance(item, str))
