"""What is known of calls by the look of their tensors, so that it is worked out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

_KEPT_LOOKS = 8  # looks that are remembered: prefill and steps, of a few batch sizes

_Found = TypeVar("_Found")


class KnownCalls(Generic[_Found]):
    """What was found out about a call, for all calls that look the same to torch.

    The same are type, dtype, shape, strides and device of each tensor, whether gradients are wanted
    of it, and what torch is doing around the call: autocast, inference mode, dispatch modes,
    functorch. Not compared are addresses and values.
    """

    def __init__(self) -> None:
        self._known: list[tuple[int, Callable[..., bool], _Found]] = []

    def find(self, tensors: Sequence[Any]) -> _Found | None:
        """What was found out about tensors like these; None where nothing was."""
        count = len(tensors)
        for index, (many, same, found) in enumerate(self._known):
            if many == count and same(*tensors):
                if index:
                    self._put(many, same, found)
                return found
        return None

    def add(self, tensors: Sequence[torch.Tensor], found: _Found) -> None:
        """Remember what was found out about these; what was used least lately is forgotten."""
        same = _build_look_guard(tensors)
        if same is not None:
            self._put(len(tensors), same, found)

    def _put(self, count: int, same: Callable[..., bool], found: _Found) -> None:
        """At the front; other threads see the list of before or the one of after."""
        others = [each for each in self._known if each[1] is not same]
        self._known = [(count, same, found), *others[: _KEPT_LOOKS - 1]]


def _build_look_guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Whether tensors look to torch like these; None where this torch cannot tell.

    Private, checked on torch 2.11 to 2.15: `torch._C._dynamo.guards.TensorGuards`, by which
    torch.compile knows whether what it compiled may be called. A torch that has none is asked by
    plain Python at each call, which gives the same answers.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    if not tensors:
        return None
    sizes: list[Any] = [[*tensor.shape] for tensor in tensors]
    strides: list[Any] = [[*tensor.stride()] for tensor in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check
