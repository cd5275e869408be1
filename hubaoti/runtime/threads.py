"""Calls that are over before a second thread has woken up: they are answered in one.

A graph for a CPU starts its threads at every loop, however short (`cpp.dynamic_threads`), where
ATen's own ops stay in one below a grain. By what a call has to compute, which its sizes tell, and
not by its time: the same call is always computed in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Multiplications. One core does so many in about 0.1 ms, which is also what it costs to start and
# end a few threads a dozen times, as a decoder block's graph does.
SMALL = 1 << 20


def is_small(constants: int, inputs: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> bool:
    """Whether a call has so little to compute that one thread is the fastest.

    At most each row of what is new in a call, as a cache is not, meets each of so many numbers of
    constants and each of all inputs.
    """
    read = constants + sum(tensor.numel() for tensor in inputs)
    return max(map(rows, new), default=1) * read <= SMALL


def rows(tensor: torch.Tensor) -> int:
    """How many vectors a tensor has; numbers stand for one each, as ids do."""
    if tensor.is_floating_point() or tensor.dtype is torch.bool:
        return tensor.numel() // max(1, tensor.shape[-1]) if tensor.dim() else 1
    return tensor.numel()


def in_one(run: Callable[[Any], Any], inputs: Any) -> Any:
    """Call with OpenMP's threads of this thread, and of no other, set to one meanwhile."""
    if OPENMP is None or (threads := OPENMP.omp_get_max_threads()) == 1:
        return run(inputs)
    OPENMP.omp_set_num_threads(1)
    try:
        return run(inputs)
    finally:
        OPENMP.omp_set_num_threads(threads)


def openmp() -> ctypes.PyDLL | None:
    """The OpenMP that torch has loaded, and its graphs with it; None where it has none.

    Not `torch.set_num_threads`, which is for all threads to come, and changes for good how MKL
    chooses its own.
    """
    library = ctypes.PyDLL(None)
    if not hasattr(library, "omp_set_num_threads") or not hasattr(library, "omp_get_max_threads"):
        return None
    library.omp_set_num_threads.restype = None
    return library


OPENMP = openmp()
