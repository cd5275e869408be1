"""What `gpu_check` is made of: checks and how they end, errors, times and memory."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Failed(Exception):
    """What a check found wrong, and what it had measured until then."""

    def __init__(self, message: str, facts: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


class Skipped(Exception):
    """Why a check has nothing to look at here."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: in words for the table, as facts for the JSON."""

    said: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Road:
    """What all checks share; `made` is what a check leaves for those that need it."""

    device: str
    folder: Path
    closing: ExitStack
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether this is the real thing, not the same lines on tiny shapes."""
        return self.device != "cpu"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. It is skipped when one that it `needs` did not pass."""

    name: str
    run: Callable[[Road], Finding]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """How a check ended: passed, failed or skipped, what it found, or why it found nothing."""

    name: str
    result: str
    why: str = ""
    found: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    trace: str | None = None


# Checks, in turn


def wanted(checks: Sequence[Check], only: str | None) -> list[Check]:
    """The checks whose name begins with one of some words, and what they need; all without one."""
    words = tuple(word for word in (only or "").split(",") if word)
    names = {check.name for check in checks if check.name.startswith(words or "")}
    for check in reversed(checks):
        if check.name in names:
            names |= {*check.needs}
    return [check for check in checks if check.name in names]


def apart(checks: Sequence[Check]) -> list[list[Check]]:
    """The checks in parts, of which none needs what is in another."""
    parts: list[list[Check]] = []
    for check in checks:
        needed = [part for part in parts if any(each.name in check.needs for each in part)]
        if not needed:
            parts.append([check])
            continue
        needed[0] += [*(each for part in needed[1:] for each in part), check]
        parts = [part for part in parts if all(part is not other for other in needed[1:])]
    return parts


def run_all(checks: Sequence[Check], road: Road) -> Iterator[Line]:
    """Each check in turn; one that fails takes those that need it with it, and no other."""
    lost: dict[str, str] = {}
    for check in checks:
        why = next((lost[name] for name in check.needs if name in lost), None)
        line = Line(check.name, "skipped", why) if why else run_one(check, road)
        if line.result != "passed":
            lost[check.name] = why or f"{check.name} {line.result}"
        yield line


def run_one(check: Check, road: Road) -> Line:
    """One check; whatever it raises is a line of the table, with the traceback in the JSON."""
    start = time.perf_counter()
    try:
        found = check.run(road)
    except Skipped as why:
        return Line(check.name, "skipped", str(why))
    except Exception as why:
        words = f"{type(why).__name__}: {why}".removeprefix("Failed: ").splitlines()
        spent = time.perf_counter() - start
        facts = why.facts if isinstance(why, Failed) else {}
        return Line(check.name, "failed", words[0], "", spent, facts, traceback.format_exc())
    return Line(check.name, "passed", "", found.said, time.perf_counter() - start, found.facts)


# Errors


def relative(found: Any, expected: Any) -> float:
    """The size of a difference, as a part of the size of what is expected (2-norms)."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


# Times


@dataclass(frozen=True, slots=True)
class Pace:
    """How times are taken: rounds that do not count, those that do, and calls in a row."""

    warm: int
    rounds: int
    row: int = 1


ALONE = Pace(10, 100)  # a call, the device idle before
QUEUED = Pace(5, 40, 8)  # calls behind each other, as the blocks of a model are
TINY = Pace(2, 10)  # on a CPU


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Gives a list that holds the milliseconds, once the block has ended."""
    spent: list[float] = []
    start = time.perf_counter()
    yield spent
    spent.append((time.perf_counter() - start) * 1000)


def milliseconds(
    road: Road, calls: Mapping[str, Any], inputs: Sequence[Any] = (), pace: Pace = ALONE
) -> dict[str, dict[str, float]]:
    """The time of each call, taken in turn so that a slow moment hits all alike."""
    import torch

    pace = pace if road.cuda else TINY
    once = by_events if road.cuda else by_clock
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for at in range(pace.warm + pace.rounds):
            for name, call in calls.items():
                spent = once(call, inputs, pace.row)
                if at >= pace.warm:
                    found[name].append(spent)
    return {name: median(times) for name, times in found.items()}


def by_events(call: Any, inputs: Sequence[Any], row: int) -> float:
    """Milliseconds of a call, between two CUDA events around a row; the device is idle before."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(row):
        call(*inputs)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / row


def by_clock(call: Any, inputs: Sequence[Any], row: int) -> float:
    """Milliseconds of a call on a CPU."""
    with stopwatch() as spent:
        for _ in range(row):
            call(*inputs)
    return spent[0] / row


def median(times: Sequence[float]) -> dict[str, float]:
    """The median, and the order statistics that hold it with a confidence of 95 %."""
    ordered, half = sorted(times), 0.98 * len(times) ** 0.5
    low, high = (int(len(ordered) / 2 + sign * half) for sign in (-1, 1))
    last = len(ordered) - 1
    return {
        "median": ordered[len(ordered) // 2],
        "low": ordered[max(low, 0)],
        "high": ordered[min(high, last)],
        "rounds": len(ordered),
    }


# Memory


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that torch's allocator gave on a GPU, above what it had given before."""

    device: Any
    before: int

    @classmethod
    def of(cls, device: Any) -> Peak:
        """From now on."""
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return cls(device, torch.cuda.memory_allocated(device))

    @property
    def bytes(self) -> int:
        """So far."""
        import torch

        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before
