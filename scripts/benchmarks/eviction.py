"""Which artifacts a full mirror should keep: traces replayed against our order, and against others.

A trace asks for artifacts by a Zipf law; some are asked for once and never again, and from time to
time a new torch or model takes the place of some. Sizes and compile seconds are lognormal. A hit
saves the seconds that a miss costs.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
import random
from bisect import bisect
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.figures import Figure, make_figure
from hubaoti.mirror.eviction import compute_worth
from hubaoti.settings import Settings


@dataclass(frozen=True)
class TraceShape:
    """How a trace is made: keys of one time, requests, how many of them are asked for but once.

    Every 400 requests `churn` keys are replaced by new ones. `alpha` is the Zipf law's.
    """

    keys: int = 200
    requests: int = 20_000
    once: float = 0.02
    churn: int = 1
    alpha: float = 1.0


# What one host of a fleet asks for; and one that is harder, with figures that were had before.
DEFAULT = TraceShape()
HARD = TraceShape(keys=2500, requests=120_000, once=0.25, churn=8, alpha=0.9)
DEFAULT_SHARE = 0.2  # of all bytes that the default trace asks for
_HORIZON = 2000  # requests in which a next use comes soon
HARD_SHARES = {0.02: 0.662, 0.05: 0.701, 0.15: 0.719}  # with the share of seconds to be saved


@dataclass(frozen=True)
class Trace:
    """Requests by number, and the bytes and compile seconds of each number."""

    requests: list[int]
    sizes: list[float]
    costs: list[float]

    @property
    def bytes(self) -> float:
        """All bytes that are asked for."""
        return sum(self.sizes[key] for key in {*self.requests})


def make_trace(shape: TraceShape, seed: int) -> Trace:
    """A trace that anyone can make again."""
    chance = random.Random(seed)
    sizes, costs = list[float](), list[float]()

    def make() -> int:
        sizes.append(max(2e5, chance.lognormvariate(math.log(6e6), 1.6)))
        costs.append(max(3.0, chance.lognormvariate(math.log(60), 1.1)))
        return len(sizes) - 1

    keys = [make() for _ in range(shape.keys)]
    chance.shuffle(keys)
    weights = [*itertools.accumulate((rank + 1) ** -shape.alpha for rank in range(shape.keys))]
    requests = []
    for turn in range(shape.requests):
        if turn % 400 == 399:
            for _ in range(shape.churn):
                place = chance.randrange(shape.keys)
                keys[place] = make()
        if chance.random() < shape.once:
            requests.append(make())
        else:
            requests.append(keys[bisect(weights, chance.random() * weights[-1])])
    return Trace(requests, sizes, costs)


class Ranked:
    """A policy that evicts what is worth least; a worth never changes but at a use."""

    def __init__(self, trace: Trace, room: float, remembers: bool) -> None:
        self.trace, self.room, self.remembers = trace, room, remembers
        self.age = 0.0
        self.uses: Counter[int] = Counter()
        self._worth: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def compute_worth(self, key: int, turn: int) -> float:
        """The worth of a key that is asked for at a turn."""
        raise NotImplementedError

    def ask(self, key: int, turn: int) -> bool:
        """Whether a key is here; it comes, where it is not."""
        hit, size = key in self._worth, self.trace.sizes[key]
        self.uses[key] += 1
        if not hit:
            while self.room < size and self._worth:
                self._evict()
            if self.room < size:
                return False
            self.room -= size
        self._worth[key] = self.compute_worth(key, turn)
        heapq.heappush(self._heap, (self._worth[key], key))
        return hit

    def _evict(self) -> None:
        worth, key = heapq.heappop(self._heap)
        if self._worth.get(key) == worth:
            self.age = max(self.age, worth)
            self.room += self.trace.sizes[key]
            del self._worth[key]
            if not self.remembers:
                del self.uses[key]


class OurOrder(Ranked):
    """The mirror's own: `hubaoti.mirror.eviction`, uses remembered."""

    def compute_worth(self, key: int, turn: int) -> float:
        """As the mirror computes it."""
        size, cost = int(self.trace.sizes[key]), self.trace.costs[key]
        return compute_worth(self.age, self.uses[key], cost, size)


class Lru(Ranked):
    """The least recently used leaves."""

    def compute_worth(self, key: int, turn: int) -> float:
        """Its time."""
        return float(turn)


class LfuDa(Ranked):
    """The least frequently used leaves, with dynamic ageing."""

    def compute_worth(self, key: int, turn: int) -> float:
        """How often it was used since it came, above the age."""
        return self.age + self.uses[key]


class Learned(Ranked):
    """What is worth least by the chance of its next use, which is learned while it runs.

    A logistic model of how often something was used, how long ago, and how long it took between two
    uses. A use is a lesson of the one before it; what is not used for `_HORIZON` requests is, too.
    """

    def __init__(self, trace: Trace, room: float, remembers: bool) -> None:
        super().__init__(trace, room, remembers)
        self._weights = [0.0, 0.0, 0.0, 0.0]
        self._seen: dict[int, tuple[int, float, list[float]]] = {}  # when, mean gap, its features
        self._waiting: deque[tuple[int, int]] = deque()

    def compute_worth(self, key: int, turn: int) -> float:
        """As ours, with the chance of a next use where that has the count of uses."""
        when, gap, features = self._seen.get(key, (turn, float(_HORIZON), None))
        if features is not None:
            gap = 0.7 * gap + 0.3 * (turn - when)
            self._learn(features, float(turn - when <= _HORIZON))
        while self._waiting and self._waiting[0][0] < turn - _HORIZON:
            at, other = self._waiting.popleft()
            if self._seen[other][0] == at:  # it was not used since
                self._learn(self._seen[other][2], 0.0)
        features = [1.0, math.log(self.uses[key]), math.log(gap + 1), math.log(turn - when + 1)]
        self._seen[key] = turn, gap, features
        self._waiting.append((turn, key))
        return self.age + self._predict(features) * self.trace.costs[key] / self.trace.sizes[key]

    def _predict(self, features: list[float]) -> float:
        score = sum(map(operator.mul, self._weights, features))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, score))))

    def _learn(self, features: list[float], was_used: float) -> None:
        error = was_used - self._predict(features)
        self._weights = [w + 0.02 * error * x for w, x in zip(self._weights, features, strict=True)]


class Belady(Ranked):
    """What is asked for again last leaves: nobody knows that before it is over."""

    def __init__(self, trace: Trace, room: float, remembers: bool) -> None:
        super().__init__(trace, room, remembers)
        self._next, later = [math.inf] * len(trace.requests), dict[int, int]()
        for turn in range(len(trace.requests) - 1, -1, -1):
            self._next[turn] = later.get(trace.requests[turn], math.inf)
            later[trace.requests[turn]] = turn

    def compute_worth(self, key: int, turn: int) -> float:
        """The sooner it is asked for, the more."""
        return -self._next[turn]


class S3Fifo:
    """Three queues: a small one for what is new, the main one, and the names of what left."""

    def __init__(self, trace: Trace, room: float) -> None:
        self._sizes, self._room = trace.sizes, room
        self._small, self._main, self._left = (OrderedDict[int, int]() for _ in range(3))
        self._small_bytes = self._main_bytes = self._left_bytes = 0.0

    def ask(self, key: int, _: int) -> bool:
        """Whether a key is here; it comes, where it is not."""
        for queue in (self._small, self._main):
            if key in queue:
                queue[key] = min(3, queue[key] + 1)
                return True
        size = self._sizes[key]
        if size > self._room:
            return False
        while self._small_bytes + self._main_bytes + size > self._room:
            self._evict()
        if key in self._left:
            del self._left[key]
            self._left_bytes -= size
            self._main[key] = 0
            self._main_bytes += size
        else:
            self._small[key] = 0
            self._small_bytes += size
        return False

    def _evict(self) -> None:
        if self._small and (self._small_bytes > 0.1 * self._room or not self._main):
            key, uses = self._small.popitem(last=False)
            self._small_bytes -= self._sizes[key]
            if uses:
                self._main[key] = 0
                self._main_bytes += self._sizes[key]
            else:
                self._remember(key)
            return
        key, uses = self._main.popitem(last=False)
        if uses:
            self._main[key] = uses - 1
        else:
            self._main_bytes -= self._sizes[key]

    def _remember(self, key: int) -> None:
        self._left[key] = 0
        self._left_bytes += self._sizes[key]
        while self._left_bytes > self._room:
            oldest, _ = self._left.popitem(last=False)
            self._left_bytes -= self._sizes[oldest]


POLICIES: dict[str, Callable[[Trace, float], Ranked | S3Fifo]] = {
    "ours": lambda trace, room: OurOrder(trace, room, remembers=True),
    "LRU": lambda trace, room: Lru(trace, room, remembers=False),
    "LFU-DA": lambda trace, room: LfuDa(trace, room, remembers=False),
    "S3-FIFO": S3Fifo,
    "learned": lambda trace, room: Learned(trace, room, remembers=True),
    "Belady": lambda trace, room: Belady(trace, room, remembers=False),
}


def replay(trace: Trace, share: float, policy: str) -> tuple[float, float]:
    """The share of requests that hit, and of compile seconds that were saved."""
    cache = POLICIES[policy](trace, trace.bytes * share)
    hits, saved = 0, 0.0
    for turn, key in enumerate(trace.requests):
        if cache.ask(key, turn):
            hits += 1
            saved += trace.costs[key]
    return hits / len(trace.requests), saved / sum(trace.costs[key] for key in trace.requests)


def bench_eviction(
    scratch: Path,
    settings: Settings,
    rounds: int,
    shapes: tuple[TraceShape, TraceShape] = (DEFAULT, HARD),
) -> Iterator[Figure]:
    """Hit rates on the default trace, and seconds saved on the hard one, each policy beside ours.

    A round is another seed, three at least.
    """
    default, hard = shapes
    traces = [make_trace(default, seed) for seed in range(max(rounds, 3))]
    for policy in POLICIES:
        found = [replay(trace, DEFAULT_SHARE, policy) for trace in traces]
        name = f"default trace, {DEFAULT_SHARE:.0%} of its bytes, {policy}"
        goal = ("at least", 0.8) if policy == "ours" else None
        yield make_figure("eviction", f"{name}, hit rate", [hits for hits, _ in found], "", goal)
        yield make_figure("eviction", f"{name}, seconds saved", [s for _, s in found], "")
    yield from _bench_hard([make_trace(hard, seed) for seed in range(3)], hard == HARD)


def _bench_hard(traces: Sequence[Trace], is_whole: bool) -> Iterator[Figure]:
    """The shares of compile seconds that are saved, the mean of the seeds."""
    for (share, least), policy in itertools.product(HARD_SHARES.items(), POLICIES):
        saved = fmean(replay(trace, share, policy)[1] for trace in traces)
        goal = ("at least", least) if policy == "ours" and is_whole else None
        name = f"hard trace, {share:.0%} of its bytes, {policy}, seconds saved"
        yield make_figure("eviction", name, [round(saved, 3)], "", goal)
