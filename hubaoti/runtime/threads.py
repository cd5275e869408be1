"""Calls that are over before a second thread has woken up: they are answered in one.

A graph for a CPU starts its threads at every loop, however short (`cpp.dynamic_threads`), where
ATen's own ops stay in one below a grain. By what a call has to compute, which its sizes tell, and
what a loop of threads costs on this host, which is measured once; not by the call's own time: the
same call is always computed in the same order.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log2, prod
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hubaoti.program.source_scan import Notes

# Multiplications that one core does in a second, roughly, and loops of a decoder block's graph.
_RATE, _LOOPS = 1e10, 12
# Where nobody has measured what a parallel loop costs: as if it took 9 microseconds.
SMALL = 1 << 20
LEAST, MOST_WORK = 1 << 14, 1 << 26
_BATCHES, _TIMES = 9, 50  # of loops that are measured; the fastest batch counts

_NOTE = "what a parallel loop costs, 1"


class Limit:
    """How many multiplications are over before a second thread is of use, in this process."""

    multiplications = SMALL
    is_known = False


def measure_threads(notes: Notes, host: str) -> None:
    """Take the limit that was measured on this kind of host before, else measure and note it.

    Once in a process: a call is computed in the same order from then on, and in every process that
    has these notes.
    """
    if Limit.is_known or OPENMP is None:
        return
    words = f"{_NOTE}: {host}, {torch.get_num_threads()} threads"
    digest = hashlib.sha256(words.encode()).hexdigest()
    kept = notes.read_note(digest)
    found = int.from_bytes(kept or b"", "big")
    if not LEAST <= found <= MOST_WORK:
        found = compute_thread_limit(time_parallel_loop(OPENMP))
        notes.note({digest: found.to_bytes(4, "big")})
        # Another process may have been faster.
        first = int.from_bytes(notes.read_note(digest) or b"", "big")
        found = first if LEAST <= first <= MOST_WORK else found
    Limit.multiplications, Limit.is_known = found, True


def compute_thread_limit(seconds: float) -> int:
    """How much one core does while the loops of a graph are started and ended; a power of two."""
    work = max(_LOOPS * _RATE * seconds, LEAST)
    return min(MOST_WORK, 1 << round(log2(work)))


def time_parallel_loop(openmp: ctypes.PyDLL) -> float:
    """What it takes to start and end a loop without work in all threads, as graphs do.

    `GOMP_parallel` is what g++ makes of every such loop, and LLVM's OpenMP has it, too. The body is
    a function of C that does nothing with nothing. Where there is no such door, what SMALL is for.
    """
    parallel = getattr(openmp, "GOMP_parallel", None)
    if parallel is None:
        return SMALL / _RATE / _LOOPS
    parallel.restype = None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    body = ctypes.cast(openmp.free, ctypes.c_void_p)

    def batch(threads: int) -> float:
        start = perf_counter()
        for _ in range(_TIMES):
            parallel(body, None, threads, 0)
        return (perf_counter() - start) / _TIMES

    alone = min(batch(1) for _ in range(_BATCHES))
    # Its own number of threads, which a graph's loops take, too.
    return max(0.0, min(batch(0) for _ in range(_BATCHES)) - alone)


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
        return rows * self.numbers + largest * longest <= Limit.multiplications


def run_in_one_thread(run: Callable[[Any], Any], inputs: Any) -> Any:
    """Call with OpenMP's threads of this thread, and of no other, set to one meanwhile."""
    # Torch is asked, and not OpenMP: in a new thread it sets its number when it is first asked.
    if OPENMP is None or (threads := torch.get_num_threads()) == 1:
        return run(inputs)
    try:
        OPENMP.omp_set_num_threads(1)
        return run(inputs)
    finally:
        OPENMP.omp_set_num_threads(threads)


def _find_openmp() -> ctypes.PyDLL | None:
    """The OpenMP that torch has loaded, and its graphs with it; None where it has none.

    Not `torch.set_num_threads`, which is for all threads to come, and changes for good how MKL
    chooses its own.
    """
    library = ctypes.PyDLL(None)
    if not hasattr(library, "omp_set_num_threads"):
        return None
    library.omp_set_num_threads.restype = None
    return library


OPENMP = _find_openmp()
