"""Whether a call is captured in a CUDA graph, which is replayed without any Python, or rehearsed.

In both, what a graph looks at may hang on nothing that Python knows of this one call: not on how
much of a cache is filled, nor on what a mask hides, nor on a tensor that was made before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Rehearsal(threading.local):
    is_on = False


_rehearsal = _Rehearsal()


def is_capturing(device: torch.device) -> bool:
    """Whether a call is captured, or rehearsed as if it were."""
    if device.type != "cuda":
        return False
    return _rehearsal.is_on or torch.cuda.is_current_stream_capturing()


def is_rehearsing() -> bool:
    """Whether what looks like a capture is computed at once."""
    return _rehearsal.is_on


@contextmanager
def rehearse() -> Iterator[None]:
    """Have this thread's calls answered as captured ones are; kernels are loaded by it."""
    _rehearsal.is_on = True
    try:
        yield
    finally:
        _rehearsal.is_on = False
