"""Figures of a benchmark: medians with an interval, goals, and sides that are measured in turn.

A ratio is taken of each pair, so that a noisy machine disturbs both sides alike. A figure is the
median of the ratios, with an interval that holds the true median in 95 of 100 runs; a goal is
reached when the whole interval is on its side.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubaoti.host.probe import probe_host
from hubaoti.settings import Settings

_CPUINFO = Path("/proc/cpuinfo")

Goal = tuple[str, float]  # ("at least" or "at most", number), or ("includes", number)


@dataclass(frozen=True)
class Figure:
    """One line: what was measured, its median and interval, and the goal."""

    section: str
    name: str
    median: float
    low: float
    high: float
    unit: str
    goal: str = ""
    reached: bool | None = None


@dataclass
class Cost:
    """What something took: seconds on the clock, and of processors, its children's among them.

    On a machine that others use the first says more of them than of what was measured.
    """

    seconds: float = 0.0
    cpu: float = 0.0


@contextmanager
def measure_cost() -> Iterator[Cost]:
    """What the block takes, known when it has ended; of children, those that have ended."""
    cost, start, before = Cost(), time.perf_counter(), _read_processor_seconds()
    yield cost
    cost.seconds, cost.cpu = time.perf_counter() - start, _read_processor_seconds() - before


def _read_processor_seconds() -> float:
    """The seconds of processors that this process and its ended children have used."""
    each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def find_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, from the order of the values (no distribution assumed)."""
    ordered, count = sorted(values), len(values)
    reach = 0.98 * count**0.5
    low = max(0, int(count / 2 - reach))
    return ordered[low], ordered[count - 1 - low]


def make_figure(
    section: str, name: str, values: Sequence[float], unit: str, goal: Goal | None = None
) -> Figure:
    """A figure of some measurements, judged by its goal."""
    low, high = find_interval(values)
    median = statistics.median(values)
    if goal is None:
        return Figure(section, name, median, low, high, unit)
    word, bound = goal
    reached = {"at least": low >= bound, "at most": high <= bound, "includes": low <= bound}
    return Figure(section, name, median, low, high, unit, f"{word} {bound:g} {unit}", reached[word])


def time_in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, one call of each a round."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return spent


def divide_pairs(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times as long, pair by pair."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def compare_costs(
    section: str, name: str, slow: Sequence[Cost], fast: Sequence[Cost], goal: Goal
) -> list[Figure]:
    """How many times as long something takes on the clock, and of processors."""
    times = divide_pairs([each.seconds for each in slow], [each.seconds for each in fast])
    of_processors = divide_pairs([each.cpu for each in slow], [each.cpu for each in fast])
    return [
        make_figure(section, name, times, "times", goal),
        make_figure(section, f"{name}, of processors", of_processors, "times", goal),
    ]


def format_figure(figure: Figure) -> str:
    """A figure as a line."""
    verdict = {True: ", reached", False: ", NOT reached", None: ""}[figure.reached]
    goal = f"; goal {figure.goal}{verdict}" if figure.goal else ""
    measured = f"{figure.median:.3g} ({figure.low:.3g} to {figure.high:.3g}) {figure.unit}"
    return f"{figure.section:9} {figure.name}: {measured.rstrip()}{goal}"


def describe_host() -> str:
    """Where figures are from: the processor, its cores, and how OpenMP's threads wait."""
    host = probe_host(Settings.from_env())
    spin = os.environ.get("GOMP_SPINCOUNT", "its default")
    return f"{host.cpu}, {_read_processor_name()}, {host.cores} cores, GOMP_SPINCOUNT {spin}"


def _read_processor_name() -> str:
    """The name that the system has for the processor."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")


def write_figures(file: Path, figures: Sequence[Figure], more: Mapping[str, Any]) -> None:
    """All figures so far, as a whole file: what fails later takes none of them with it."""
    facts = {
        "figures": [asdict(each) for each in figures],
        "load": os.getloadavg(),
        "host": describe_host(),
        **more,
    }
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(facts, indent=2))
    new.replace(file)
