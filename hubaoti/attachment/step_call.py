"""A step as it is called: its arguments, sorted by what a replay does with each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LITERALS = (bool, int, float, str, type(None))
_PLAIN = (torch.Tensor, nn.Parameter)

Place = tuple[str | int, ...]
Look = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A step as it is called: its tensors by their places, its cache, and what must be equal.

    `told` is where the mask stands of which lengths say all.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    tensors: dict[Place, torch.Tensor]
    cache: Any
    told: Place | None
    look: Look

    def replace(self, tensors: Mapping[Place, torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with other tensors in their places."""
        args, kwargs = [*self.args], {**self.kwargs}
        for (name, *within), tensor in tensors.items():
            arguments: Any = args if isinstance(name, int) else kwargs
            if within:
                arguments[name] = {**arguments[name], within[0]: tensor}
            else:
                arguments[name] = tensor
        return args, kwargs


@dataclass(slots=True)
class Arguments:
    """What a call is given, sorted: tensors by their places, caches, and what must be equal."""

    tensors: dict[Place, torch.Tensor] = field(default_factory=dict)
    caches: list[Any] = field(default_factory=list)
    look: list[Any] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many there are of each row; none where they do not stand where they should."""
        ids = self.tensors.get(("input_ids",), self.tensors.get((0,)))
        return ids.shape[1] if ids is not None and ids.dim() == 2 else 0


def sort_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments | None:
    """What a call is given; None where there is something that nobody knows how to compare."""
    found = Arguments()
    for place, value in _walk_arguments(args, kwargs):
        if type(value) in _PLAIN:
            found.tensors[place] = value
            found.look.append((place, value.dtype, value.device, *value.shape))
        elif isinstance(value, LITERALS):
            found.look.append((place, value))
        elif hasattr(value, "layers"):
            found.caches.append(value)
            found.look.append(place)
        else:
            return None
    return found


def _walk_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """What a call is given, by its places: arguments, and what is in dictionaries of them."""
    given: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
    for name, value in given:
        if type(value) is dict:
            yield from (((name, key), each) for key, each in value.items())
        else:
            yield (name,), value
