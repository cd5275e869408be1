"""The models that an engine knows, and the memory that they share.

The one whose loading would cost the least for the memory that it holds makes room for another
(GDSF: seconds x uses / bytes, above the value of what left last); one in use never does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from hubaoti.disk import format_mebibytes
from hubaoti.engines.background_compile import Building
from hubaoti.engines.messages import Begin, EngineRequest, EngineResponse, State
from hubaoti.errors import BadRequest, NotEnoughMemory
from hubaoti.host.memory import read_available_memory


class Unloaded(BadRequest):
    """A model that is not loaded, or not any more."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not loaded", hint=f"engine.load({name!r}) first")


class Holder(Protocol):
    """What holds a loaded model: this process (`Resident`) or one of its own (`Isolated`).

    `problem` says why its graphs do not answer any more.
    """

    problem: str

    @property
    def bytes(self) -> int: ...
    @property
    def pid(self) -> int | None: ...
    def ask(self, ask: EngineRequest) -> EngineResponse: ...
    def state(self) -> State: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """How a model stands: `compiled`, `eager` or `unloaded`; `why` says why it has no graphs.

    `bytes` are what it holds now, `seconds` what loading it took, `requests` what it was asked so
    far; `pid` is of its worker, where it has one.
    """

    model: str
    task: str
    state: str
    artifact: str | None
    bytes: int
    seconds: float
    requests: int
    is_building: bool
    pid: int | None
    why: str


@dataclass(slots=True)
class ModelSlot:
    """A model that the engine knows, loaded or not; `needs` are the bytes before it is."""

    name: str
    begin: Begin
    needs: int
    revision: str | None = None
    why: str = ""
    untried: str | None = None  # an artifact that something else kept from answering
    is_asked: bool = False  # its artifact was given: what is wrong with it is raised
    building: Building | None = None
    holder: Holder | None = None
    bytes: int = 0  # what it counts for, as soon as it is being loaded
    users: int = 0
    requests: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def value(self) -> float:
        """What would be lost with it, for each byte."""
        return self.clock + self.seconds * max(1, self.requests) / max(1, self.bytes)

    def standing(self) -> ModelStatus:
        """How it stands, as a record that does not change with it."""
        holder, building = self.holder, self.building
        state = "unloaded" if holder is None else "compiled" if self.begin.digest else "eager"
        return ModelStatus(
            model=self.name,
            task=self.begin.task,
            state=state,
            artifact=self.begin.digest,
            bytes=self.bytes,
            seconds=round(self.seconds, 3),
            requests=self.requests,
            is_building=building is not None and not building.is_done(),
            pid=holder.pid if holder else None,
            why=self.why,
        )

    def let_go(self) -> None:
        """Give its memory back; the slot stays, so that it can be loaded again."""
        holder, self.holder = self.holder, None
        self.bytes = 0
        if holder is not None:
            holder.close()


class ModelPool:
    """The places of models; safe from many threads."""

    def __init__(self, most: int | None) -> None:
        """`most` are the bytes that all may hold; None is what the machine has free."""
        self._most = most
        self._places: dict[str, ModelSlot] = {}
        self._free = threading.Condition()
        self._clock = 0.0

    def __iter__(self) -> Iterator[ModelSlot]:
        with self._free:
            return iter([*self._places.values()])

    def find(self, name: str) -> ModelSlot | None:
        """The place of a model; None where it has none."""
        with self._free:
            return self._places.get(name)

    def get(self, name: str) -> ModelSlot:
        """The place of a model.

        Raises:
            BadRequest: it has none.
        """
        if (place := self.find(name)) is None:
            raise Unloaded(name)
        return place

    def add(self, place: ModelSlot) -> ModelSlot:
        """A place for a model, or the one that another thread gave it."""
        with self._free:
            return self._places.setdefault(place.name, place)

    def drop(self, place: ModelSlot) -> None:
        """Take a model's place away, once nobody uses it."""
        with place.lock:
            if place.building is not None:
                place.building.stop()
                place.building = None
            with self._free:
                place.let_go()
                if self._places.get(place.name) is place:
                    del self._places[place.name]
                self._free.notify_all()

    @contextmanager
    def using(self, name: str) -> Iterator[ModelSlot]:
        """A model's place, for one request at a time; it does not leave meanwhile."""
        with self._free:
            place = self.get(name)
            place.users += 1
        try:
            with place.lock:
                if self.find(name) is not place:  # another thread took it away
                    raise Unloaded(name)
                place.clock = self._clock
                yield place
        finally:
            with self._free:
                place.users -= 1
                self._free.notify_all()

    def reserve(self, place: ModelSlot) -> None:
        """Count a model's memory as taken, as soon as there is enough.

        Raises:
            NotEnoughMemory: there never will be.
        """
        with self._free:
            while (lacking := self._lacking(place)) > 0:
                if self._evict(place):
                    continue
                if not any(each.bytes for each in self._others(place)):
                    raise self._too_large(place, lacking)
                self._free.wait()
            place.bytes = place.needs

    def settle(self, place: ModelSlot) -> None:
        """Count what a model holds by now; where all hold too much, others leave."""
        with self._free:
            place.bytes = place.holder.bytes if place.holder is not None else 0
            while self._most is not None and sum(each.bytes for each in self) > self._most:
                if not self._evict(place):
                    break
            self._free.notify_all()

    def _others(self, place: ModelSlot) -> list[ModelSlot]:
        return [each for each in self if each is not place]

    def _evict(self, place: ModelSlot) -> bool:
        """Unload the least valuable beside one; whether there was any. It may be loaded again."""
        idle = [each for each in self._others(place) if each.holder is not None and not each.users]
        if not idle:
            return False
        least = min(idle, key=lambda each: each.value)
        self._clock = least.value
        least.let_go()
        return True

    def _lacking(self, place: ModelSlot) -> int:
        """The bytes that a model lacks: of the machine's, and of what all may hold."""
        lacking = place.needs - read_available_memory()
        if self._most is not None:
            held = sum(each.bytes for each in self._others(place))
            lacking = max(lacking, held + place.needs - self._most)
        return lacking

    def _too_large(self, place: ModelSlot, lacking: int) -> NotEnoughMemory:
        have = place.needs - lacking
        said = "may be held" if have == self._most else "are free"
        return NotEnoughMemory(
            f"{place.name} takes {format_mebibytes(place.needs)} of memory; "
            f"{format_mebibytes(have)} {said}",
            hint="give the engine more memory, or load it in bfloat16 or quantized",
        )
