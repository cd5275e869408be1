"""Errors, times and memory of a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.figures import find_interval


def measure_error(found: Any, expected: Any) -> float:
    """The size of a difference, as a part of the size of what is expected (2-norms)."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@dataclass(frozen=True, slots=True)
class Pace:
    """How times are taken: rounds that do not count, those that do, and calls in a row."""

    warm: int
    rounds: int
    row: int = 1


ALONE = Pace(10, 100)  # a call, the device idle before
QUEUED = Pace(5, 40, 8)  # calls behind each other, as the blocks of a model are
_TINY = Pace(2, 10)  # on a CPU


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Gives a list that holds the milliseconds, once the block has ended."""
    spent: list[float] = []
    start = time.perf_counter()
    yield spent
    spent.append((time.perf_counter() - start) * 1000)


def time_calls(
    device: torch.device,
    calls: Mapping[str, Any],
    inputs: Sequence[Any] = (),
    pace: Pace = ALONE,
) -> dict[str, dict[str, float]]:
    """The time of each call, taken in turn so that a slow moment hits all alike."""
    cuda = device.type == "cuda"
    pace = pace if cuda else _TINY
    once = _time_by_events if cuda else _time_by_clock
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for index in range(pace.warm + pace.rounds):
            for name, call in calls.items():
                spent = once(call, inputs, pace.row)
                if index >= pace.warm:
                    found[name].append(spent)
    return {name: summarize(times) for name, times in found.items()}


def _time_by_events(call: Any, inputs: Sequence[Any], row: int) -> float:
    """Milliseconds of a call, between two CUDA events around a row; the device is idle before."""
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(row):
        call(*inputs)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / row


def _time_by_clock(call: Any, inputs: Sequence[Any], row: int) -> float:
    """Milliseconds of a call on a CPU."""
    with stopwatch() as spent:
        for _ in range(row):
            call(*inputs)
    return spent[0] / row


def summarize(times: Sequence[float]) -> dict[str, float]:
    """The median, and the order statistics that hold it with a confidence of 95 %."""
    low, high = find_interval(times)
    return {"median": statistics.median(times), "low": low, "high": high, "rounds": len(times)}


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that torch's allocator gave on a GPU, above what it had given before."""

    device: torch.device
    before: int

    @classmethod
    def of(cls, device: torch.device) -> Peak:
        """From now on."""
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return cls(device, torch.cuda.memory_allocated(device))

    @property
    def bytes(self) -> int:
        """So far."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before
