"""Which artifact leaves first: greedy dual size with frequency, over what getting it back costs.

An artifact's worth is the mirror's age when it was last asked for, and above that its uses times
the seconds that getting it back takes, for each byte. The age is the worth of what left last, so
that what was worth much once does not stay for ever (Cherkasova, "Improving WWW Proxies Performance
with Greedy-Dual-Size-Frequency Caching Policy", 1998). How often something was used is remembered
when it has left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DOWNLOAD_RATE = 25e6  # bytes a second, where no download was measured


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may leave: `cost` seconds bring it back, `age` was the mirror's at its last use.

    `is_allowed` and `is_runnable` say that it may be opened here, and that some torch can.
    """

    digest: str
    size: int
    opens: int
    cost: float
    age: float
    is_allowed: bool = True
    is_runnable: bool = True

    @property
    def worth(self) -> float:
        """By which those that are of use are ordered; also the age of a mirror that it leaves."""
        return compute_worth(self.age, self.opens, self.cost, self.size)


def compute_worth(age: float, uses: int, cost: float, size: int) -> float:
    """The worth of something of `size` bytes that was used so often; one use is its coming."""
    return age + max(uses, 1) * cost / max(size, 1)


def estimate_cost(size: int, seconds: float, compile_seconds: float | None) -> float:
    """The seconds to get an artifact back: by compiling, if it is nowhere else, else by a download
    that took `seconds` before, 0 if nobody knows."""
    if compile_seconds is not None:
        return compile_seconds
    return seconds or 1.0 + size / DOWNLOAD_RATE


def order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that may leave, the first one first: what may not be opened, what no torch here can
    run, and then what is worth least."""
    return sorted(
        candidates, key=lambda each: (each.is_allowed, each.is_runnable, each.worth, each.digest)
    )
