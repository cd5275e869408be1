"""A model that runs without values: what it is told where it asks for one, and what it kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from hubaoti.compiler.capture import Call
from hubaoti.compiler.patched import patch_attribute


def run_outside_blocks(func: Any, args: Any, kwargs: Any, truth: bool) -> Any:
    """An operation between the blocks, where what has no values is zero, or false, to who asks.

    That decides what the model does around its blocks, as with a rope that grows: it stays eager.
    What they are given in another case is another call to their graphs. With `truth`, it is true:
    that a mask is all ones, say, so that it can be left out.
    """
    try:
        return func(*args, **kwargs)
    except DataDependentOutputException:
        dtype = args[0].dtype if func is torch.ops.aten._local_scalar_dense.default else torch.bool
        return 0.0 if dtype.is_floating_point else truth if dtype is torch.bool else 0


@contextmanager
def pretend_real() -> Iterator[None]:
    """Have transformers leave out masks that say nothing, as it does wherever nothing is traced.

    Private, there in transformers 5.15 to 5.24: `utils.import_utils.is_fake_tensor`, by which it
    knows a run without values. Where it has another name, masks stay.
    """
    from transformers.utils import import_utils

    if not hasattr(import_utils, "is_fake_tensor"):
        yield
        return
    with patch_attribute(import_utils, "is_fake_tensor", lambda _: False):
        yield


def count_cached(call: Call) -> tuple[int, int]:
    """How many keys, and how many recurrent states, are in the caches of a call, which count."""
    layers = [layer for cache in call.caches for layer in getattr(cache, "layers", ())]
    puts = sum(len(getattr(layer, "puts", ())) for layer in layers)
    return puts, sum(getattr(layer, "states", 0) for layer in layers)
