"""Memory that is held: by this process, by a call in it, by a tree of processes, by what leaks."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure, make_figure
from hubaoti.host.memory import list_descendants, measure_process_memory

_GLANCE = 0.05  # seconds between two looks at a tree of processes


@dataclass
class TreePeak:
    """The most that a process and all below it held at once, in bytes."""

    bytes: int = 0


@contextmanager
def watch_tree(process: int) -> Iterator[TreePeak]:
    """Look at a tree of processes every few milliseconds, as long as the block lasts.

    Unlike `hubaoti.host.memory.Peak` nothing of this process is in it.
    """
    peak, ended = TreePeak(), threading.Event()

    def look() -> None:
        while not ended.wait(_GLANCE):
            held = map(measure_process_memory, list_descendants(str(process)))
            peak.bytes = max(peak.bytes, sum(held))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def read_memory(name: str) -> int:
    """The bytes of a line of what the kernel says of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def measure_growth(call: Callable[[], object]) -> int:
    """By how many bytes this process grows while something runs, at most."""
    trim_heap()  # else what was freed before is taken again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = read_memory("VmRSS")
    answer = call()
    grown = read_memory("VmHWM") - before
    del answer
    return max(grown, 0)


def trim_heap() -> None:
    """Give the system back what is free."""
    ctypes.CDLL(None).malloc_trim(0)


def measure_leaks(
    section: str, name: str, once: Callable[[], object], times: int, temporary: Path | None = None
) -> Iterator[Figure]:
    """What is left of something that is done many times, when it has settled.

    Files, threads, what lies in a folder of temporary files, and memory.
    """
    kept: list[tuple[int, int]] = []
    folders = [Path("/proc/self/fd"), Path("/proc/self/task"), *([temporary] if temporary else [])]
    for index in range(times + 1):
        once()
        if index in {times // 20, times}:
            count = sum(len([*folder.iterdir()]) for folder in folders)
            kept.append((count, read_memory("VmRSS")))
    more, grown = (after - before for before, after in zip(*kept, strict=True))
    yield make_figure(section, f"{name}, files and threads more", [more], "", ("at most", 0))
    yield make_figure(section, f"{name}, memory more", [grown / 1e6], "MB", ("at most", 20))
