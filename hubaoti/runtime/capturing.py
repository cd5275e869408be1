"""Whether a call is captured in a CUDA graph, which is replayed without any Python, or rehearsed.

In both, what a graph looks at may hang on nothing that Python knows of this one call: not on how
much of a cache is filled, nor on what a mask hides, nor on a tensor that was made before. But for
what whoever captures asks anew before each replay, as that a mask hides only what lengths tell.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _State(threading.local):
    is_rehearsing = False
    is_recording = False
    told: tuple[torch.Tensor, torch.Tensor] | None = None


_state = _State()


def is_capturing(device: torch.device) -> bool:
    """Whether a call is captured, or rehearsed as if it were."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return _state.is_rehearsing or torch.cuda.is_current_stream_capturing()


def is_rehearsing() -> bool:
    """Whether what looks like a capture is computed at once."""
    return _state.is_rehearsing


def is_recording() -> bool:
    """Whether a capture is our own, of which is known when it is given up."""
    return _state.is_recording


@contextmanager
def rehearse() -> Iterator[None]:
    """Have this thread's calls answered as captured ones are; kernels are loaded by it."""
    _state.is_rehearsing = True
    try:
        yield
    finally:
        _state.is_rehearsing = False


@contextmanager
def record() -> Iterator[None]:
    """While this thread captures for us."""
    _state.is_recording = True
    try:
        yield
    finally:
        _state.is_recording = False


@contextmanager
def tell(mask: torch.Tensor, simpler: torch.Tensor) -> Iterator[None]:
    """While it is known that a graph that asks for lengths may have another mask for this one."""
    _state.told = mask, simpler
    try:
        yield
    finally:
        _state.told = None


def find_told(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask that was told of for this very one; None where nothing is known of it."""
    told = _state.told
    return told[1] if told is not None and told[0] is mask else None
