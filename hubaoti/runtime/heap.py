"""Memory that nobody needs any more, given back to the system before it has to ask for it."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_Range = tuple[int, int]  # addresses, the end not included
_PAGEOUT = 21  # linux/mman.h, since 5.4; python has no name for it


def release_pages(ranges: Iterable[_Range]) -> None:
    """Let go of files' pages within some ranges, and of what the allocator keeps for later.

    A checkpoint is mapped, and stays so while one tensor of it is used: the others would count as
    ours for as long. Whoever still reads such a page gets it from the file again, so it is right to
    name too many. On a system without these calls nothing is given back.
    """
    if sys.platform != "linux":
        return
    native = ctypes.CDLL(None)
    for start, end in intersect_pages(ranges, _list_file_ranges()):
        native.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
    if hasattr(native, "malloc_trim"):  # of glibc
        native.malloc_trim(0)


def intersect_pages(ranges: Iterable[_Range], wholes: Iterable[_Range]) -> Iterator[_Range]:
    """The whole pages that are in one of the ranges and in one of the others."""
    places = [*wholes]
    for low, high in ranges:
        for start, end in places:
            first = -(-max(low, start) // mmap.PAGESIZE) * mmap.PAGESIZE
            last = min(high, end) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                yield first, last


def _list_file_ranges() -> Iterator[_Range]:
    """Where files are mapped that code is not read from, as the kernel lists it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, allowed, _, _, inode, *_ = line.split()
        if inode != "0" and "x" not in allowed:
            start, end = span.split("-")
            yield int(start, 16), int(end, 16)
