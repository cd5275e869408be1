"""Lists and dictionaries among a call's arguments: what a module leaves in them, a graph does too.

A graph answers tensors only. What its module put into a list or a dictionary that it was given is
an output of the graph, which is put back after the call; what was there before, and what else the
call gives, is named by its path in the call.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from hubaoti.artifact.schema import Outputs
from hubaoti.runtime.call_template import walk_template
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.output_template import parse_output_template

# Those that do nothing else when they are written; transformers shares keys in a UserDict.
_WRITABLE = {list, dict, OrderedDict, defaultdict, UserDict}
_PLAIN_TYPES = (bool, int, float, str, type(None), torch.dtype, torch.device)

_Key = str | int
Path = tuple[_Key, ...]
Items = list[tuple[_Key, Any]]


def list_items(value: Any) -> Items:
    """What a container holds, by keys or places; nothing of anything else."""
    if isinstance(value, Mapping):
        return [*value.items()]
    return [*enumerate(value)] if isinstance(value, (list, tuple)) else []


def walk_containers(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """A value and all that it holds, each with its path."""
    yield path, value
    for key, item in list_items(value):
        yield from walk_containers(item, (*path, key))


@dataclass(frozen=True, slots=True)
class ContainerChange:
    """What a container of a call holds since its module was called."""

    path: Path
    items: Items


class Contents:
    """What a call's arguments, by name, held before its module was called."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._values = [pair for pair in walk_containers(arguments, ()) if pair[0]]
        self._before = {path: list_items(value) for path, value in self._values}
        self.places: dict[int, Path] = {}
        for path, value in self._values:
            if not isinstance(value, _PLAIN_TYPES):
                self.places.setdefault(id(value), path)

    def changes(self) -> list[ContainerChange]:
        """The containers that hold something else by now, in the order of the call."""
        return [
            ContainerChange(path, list_items(value))
            for path, value in self._values
            if not _have_same_items(self._before[path], list_items(value))
        ]


def _have_same_items(first: Items, second: Items) -> bool:
    """Whether two containers hold the same under the same keys, in one order."""
    return len(first) == len(second) and all(
        key == other and _is_same_value(value, item)
        for (key, value), (other, item) in zip(first, second, strict=True)
    )


def _is_same_value(first: Any, second: Any) -> bool:
    """Whether two values are one object, or equal literals of one type."""
    both = type(first) is type(second) and isinstance(first, _PLAIN_TYPES)
    return first is second or (both and bool(first == second))


@dataclass(frozen=True, slots=True)
class Filling:
    """One call's containers that its graph writes, and the objects that they get of the call."""

    containers: tuple[Any, ...]
    given: tuple[Any, ...]


class Answers:
    """What a graph's outputs become: its module's answer, and what that leaves in its call."""

    def __init__(self, outputs: Outputs) -> None:
        writes = () if isinstance(outputs.writes, msgspec.UnsetType) else outputs.writes
        self.into = [write.into for write in writes]
        templates = [outputs.template, *(item for write in writes for _, item in write.items)]
        words = (pair for each in templates for pair in walk_template(each))
        self._given = [*dict.fromkeys(tuple(path) for word, path in words if word == "given")]
        places = {path: len(outputs.tensors) + index for index, path in enumerate(self._given)}
        self._items = [
            [(key, parse_output_template(item, places)) for key, item in write.items]
            for write in writes
        ]
        self.writes = bool(writes)
        self.make = parse_output_template(outputs.template, places)

    def find(self, arguments: Mapping[str, Any]) -> Filling:
        """The containers of a call that will be written, before its graph runs.

        Raises:
            CannotServe: one is of a kind that has its own way to be written, or is given twice.
        """
        containers = tuple(get_at_path(arguments, path) for path in self.into)
        every = [value for _, value in walk_containers(arguments, ()) if type(value) in _WRITABLE]
        for path, each in zip(self.into, containers, strict=True):
            if type(each) not in _WRITABLE:
                message = f"{spell_path(path)}, which is written, is a {type(each).__name__}"
                raise CannotServe("arguments", message)
            if sum(each is other for other in every) > 1:
                raise CannotServe(
                    "arguments", f"{spell_path(path)}, which is written, is given twice"
                )
        return Filling(containers, tuple(get_at_path(arguments, path) for path in self._given))

    def make_contents(self, filling: Filling, outputs: Sequence[torch.Tensor]) -> list[Items]:
        """What each of the containers is to hold, of a graph's outputs."""
        values = [*outputs, *filling.given]
        return [[(key, make(values)) for key, make in items] for items in self._items]

    def fill(self, filling: Filling, outputs: Sequence[torch.Tensor]) -> Any:
        """The answer, after the containers hold what the module would have left in them."""
        for container, items in zip(
            filling.containers, self.make_contents(filling, outputs), strict=True
        ):
            fill_container(container, items)
        return self.make([*outputs, *filling.given])


def spell_path(path: Path) -> str:
    """A path in a call as people read it."""
    return ".".join(map(str, path))


def fill_container(container: Any, items: Items) -> None:
    """Have a list or a dictionary hold these; what it holds already under a key stays there."""
    if isinstance(container, list):
        container[:] = [value for _, value in items]
        return
    wanted = dict(items)
    for key in container.keys() - wanted.keys():
        del container[key]
    for key, value in items:
        if key not in container or container[key] is not value:
            container[key] = value
    if [*container] != [*wanted]:  # one was taken out and put back
        container.clear()
        container.update(items)


def get_at_path(arguments: Mapping[str, Any], path: Path) -> Any:
    """What a call gives at a path.

    Raises:
        CannotServe: nothing.
    """
    value: Any = arguments
    try:
        for key in path:
            value = value[key]
    except (LookupError, TypeError) as error:
        raise CannotServe("arguments", f"{spell_path(path)} is not given") from error
    return value
