"""Calls that are over before a second thread has woken up: they are answered in one.

A graph for a CPU starts its threads at every loop, however short (`cpp.dynamic_threads`), where
ATen's own ops stay in one below a grain. By what a call has to compute, which its sizes tell, and
not by its time: the same call is always computed in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

# Multiplications. One core does so many in about 0.1 ms, which is also what it costs to start and
# end a few threads a dozen times, as a decoder block's graph does.
SMALL = 1 << 20


@dataclass(frozen=True, slots=True)
class Constants:
    """What a graph multiplies its inputs by: how many numbers, and how wide a row of an input is.

    `widths` are those that each of its matrices takes or gives, `narrowest` is what a row has at
    least. A kernel, as of a convolution, meets every number of what it is moved over.
    """

    numbers: int
    widths: frozenset[int]
    narrowest: int

    @classmethod
    def of(cls, shapes: Iterable[Sequence[int]]) -> Constants:
        """The same of the shapes of all constants."""
        known = [*shapes]
        several = [each if len(each) == 2 else (1,) for each in known if len(each) > 1] or [(1,)]
        widths = frozenset[int].intersection(*map(frozenset, several))
        return cls(sum(map(prod, known)), widths, max(1, min(map(min, several))))

    def rows(self, tensor: torch.Tensor) -> int:
        """At most how many rows of a tensor they meet; whole numbers become one each."""
        last = tensor.shape[-1] if tensor.dim() else 1
        width = last if last in self.widths else self.narrowest
        is_id = not tensor.is_floating_point() and tensor.dtype is not torch.bool
        return tensor.numel() if is_id else -(-tensor.numel() // max(1, width))

    def is_small(self, inputs: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> bool:
        """Whether a call has so little to compute that one thread is the fastest.

        Each row of what is `new`, as a cache is not, meets all constants, and each number of it a
        number for each place of another input, as in attention.
        """
        longest = max((size for tensor in inputs for size in tensor.shape), default=1)
        largest = max((tensor.numel() for tensor in new), default=0)
        rows = max(map(self.rows, new), default=1)
        return rows * self.numbers + largest * longest <= SMALL


def in_one(run: Callable[[Any], Any], inputs: Any) -> Any:
    """Call with OpenMP's threads of this thread, and of no other, set to one meanwhile."""
    # Torch is asked, and not OpenMP: in a new thread it sets its number when it is first asked.
    if OPENMP is None or (threads := torch.get_num_threads()) == 1:
        return run(inputs)
    try:
        OPENMP.omp_set_num_threads(1)
        return run(inputs)
    finally:
        OPENMP.omp_set_num_threads(threads)


def openmp() -> ctypes.PyDLL | None:
    """The OpenMP that torch has loaded, and its graphs with it; None where it has none.

    Not `torch.set_num_threads`, which is for all threads to come, and changes for good how MKL
    chooses its own.
    """
    library = ctypes.PyDLL(None)
    if not hasattr(library, "omp_set_num_threads"):
        return None
    library.omp_set_num_threads.restype = None
    return library


OPENMP = openmp()
