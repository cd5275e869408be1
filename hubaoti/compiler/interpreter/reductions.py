"""Reductions and scans of Triton's interpreter: over all rows at once, by halves.

It has them one element at a time, but for sums and the like. Values are combined in their order.
Private, checked on triton 3.6 and 3.9: `ReduceOps.generic_reduce`, `ScanOps.generic_scan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def replace_reductions(interpreter: Any) -> None:
    """Have the interpreter do them so.

    Raises:
        AttributeError: it has none of these names.
    """
    assert callable(interpreter.ReduceOps.generic_reduce)
    assert callable(interpreter.ScanOps.generic_scan)
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.ScanOps.generic_scan = _scan


def _reduce(operation: Any, values: Any) -> list[Any]:
    """What an operator makes of all values along an axis, or of all there are."""
    kinds = [value.dtype for value in values]
    data = [value.handle.data for value in values]
    axis, places = operation.axis, (operation.axis,)
    if axis is None:
        axis, places = 0, (*range(data[0].ndim),)
        data = [each.reshape(-1) for each in data]
    data = [np.moveaxis(each, axis, 0) for each in data]
    while len(data[0]) > 1:
        pairs = [each[0::2] for each in data], [each[1::2] for each in data]
        data = _combine(operation, *pairs, kinds)
    found = [each[0] for each in data]
    if operation.keep_dims:
        found = [np.expand_dims(each, places) for each in found]
    return [operation.to_tensor(each, kind) for each, kind in zip(found, kinds, strict=True)]


def _scan(operation: Any, values: Any) -> list[Any]:
    """What an operator makes of each value and all before it along an axis."""
    kinds = [value.dtype for value in values]
    data = [np.moveaxis(value.handle.data, operation.axis, 0) for value in values]
    length, distance = len(data[0]), 1
    while distance < length:
        before = [np.concatenate((each[:distance], each[:-distance])) for each in data]
        pairs = zip(data, _combine(operation, before, data, kinds), strict=True)
        data = [np.concatenate((each[:distance], joined[distance:])) for each, joined in pairs]
        distance *= 2
    found = [np.ascontiguousarray(np.moveaxis(each, 0, operation.axis)) for each in data]
    return [operation.to_tensor(each, kind) for each, kind in zip(found, kinds, strict=True)]


def _combine(
    operation: Any, left: Sequence[Any], right: Sequence[Any], kinds: Sequence[Any]
) -> list[Any]:
    """What a kernel's operator makes of two rows of values, as arrays."""
    given = [
        operation.to_tensor(np.ascontiguousarray(each), kind)
        for side in (left, right)
        for each, kind in zip(side, kinds, strict=True)
    ]
    found = operation.combine_fn(*given)
    found = [found] if hasattr(found, "handle") else [*found]
    shape = left[0].shape
    return [
        np.broadcast_to(getattr(each, "handle", each).data, shape).astype(like.dtype, copy=False)
        for each, like in zip(found, left, strict=True)
    ]
